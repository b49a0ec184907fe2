"""What is left to do: images of the listing that no explanation file names."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loraseg.bulk.ledger import FOLDER, Ledger, etag_digest
from loraseg.bulk.mask_names import MaskNames, digest_of, id_of, plain_name
from loraseg.storage import Listed, ObjectNotFoundError, ObjectStore
from loraseg.storage.store import key_fault

__all__ = ["MAX_IMAGE_BYTES", "Item", "Part", "parts", "stale_files"]

# An object is read whole; no PNG or JPEG of as many pixels as are decoded is larger.
MAX_IMAGE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """One image to segment, and where its mask goes; ``etag`` as it was listed, "" if unknown."""

    key: str
    size_bytes: int
    etag: str
    mask: str


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of work: the images of one explanation file."""

    file: str
    items: tuple[Item, ...]


def stale_files(images: ObjectStore, ledger: Ledger) -> set[str]:
    """Return the explanation files with an image that was replaced since, or that failed.

    A folder keeps no etags: there, every image that is done is read once more.
    """
    files = {name for name, facts in ledger.files.items() if facts.statuses.get("failed")}
    for listed in images.scan() if len(ledger.ids) else ():
        entry = ledger.etag_of(digest_of(listed.key))
        if entry is None or entry[1] in files:
            continue
        etag = listed.etag if listed.etag is not None else _read_etag(images, listed)
        if etag is not None and etag_digest(etag) != entry[0]:
            files.add(entry[1])
    return files


def parts(listing: Iterable[Listed], ledger: Ledger, each: int) -> Iterator[Part]:
    """Cut the images that are not done into parts of ``each``, in the order of the listing.

    Needs memory for one part. Markers of empty folders are no images.
    """
    names = MaskNames()
    waiting: list[Item] = []
    for listed in listing:
        if listed.key.endswith("/"):
            continue
        done = digest_of(listed.key) in ledger
        plain = plain_name(listed.key)
        taken = not done and plain is not None and ledger.holds_mask(plain)
        mask = names.name(listed.key, taken=taken)
        if done:
            continue
        waiting.append(Item(listed.key, listed.size_bytes, listed.etag or "", mask))
        if len(waiting) == each:
            yield _part(waiting)
            waiting = []
    if waiting:
        yield _part(waiting)


def _part(items: Sequence[Item]) -> Part:
    ids = "\n".join(id_of(item.key) for item in items)
    return Part(f"{FOLDER}/{hashlib.sha256(ids.encode()).hexdigest()[:32]}.parquet", tuple(items))


def _read_etag(images: ObjectStore, listed: Listed) -> str | None:
    """Return the etag by reading the object, None if it has gone; results of it stay."""
    if listed.size_bytes > MAX_IMAGE_BYTES or key_fault(listed.key):
        return ""
    try:
        return images.get_with_etag(listed.key)[1]
    except ObjectNotFoundError:
        return None
