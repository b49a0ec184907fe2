"""A tiny service: models as files, a library on a store that can be switched off."""

import time

from loraseg.errors import StoreError
from loraseg.inference.request import SegmentRequest
from loraseg.inference.selection import AdapterQuery, AdaptiveSettings
from loraseg.library import Library
from loraseg.serving.config import ServiceConfig
from loraseg.storage import LocalStore, open_store
from tests.unit.tiny import CLASSES

SETTINGS = AdaptiveSettings(k=2, temperature=3.0)


class SwitchedStore(LocalStore):
    """A folder that records reads, and is unreachable while ``is_on`` is False."""

    is_on = True

    def __init__(self, root):
        super().__init__(root)
        self.read = []

    def get(self, key):
        self.read.append(key)
        if not self.is_on:
            raise StoreError("s3://secret-bucket: connection refused")
        return super().get(key)


def switched_library(folder):
    store = SwitchedStore(folder)
    return store, Library(store)


def service_config(models, libraries, **options):
    uris = {name: str(uri) for name, uri in libraries.items()}
    return ServiceConfig(
        libraries=uris, base=models[0], encoder=models[1], **{"poll_s": 0.05, **options}
    )


def adapter_query(*, only=(), exclude=(), settings=SETTINGS):
    return AdapterQuery(settings=settings, only=frozenset(only), exclude=frozenset(exclude))


def segment_request(image, *, library="main", timeout_s=30.0, classes=CLASSES, **options):
    given = {name: options.pop(name) for name in ("only", "exclude", "settings") if name in options}
    return SegmentRequest(
        image=image,
        classes=tuple(classes),
        library=library,
        query=adapter_query(**given),
        deadline=time.time() + timeout_s,
        **options,
    )


def blob_paths(folder, library, name):
    """Return the paths of the files of an adapter's current version."""
    from loraseg.library.records import blob_key, read_record

    record = read_record(open_store(str(folder)), library.entry(name))
    return {file: folder / blob_key(blob.sha256) for file, blob in record.files.items()}
