"""Opens a dataset by path or URI with the reader of its layout."""

from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loraseg.data.datasets import Dataset, Reader
from loraseg.data.readers import READERS
from loraseg.data.readers.remote import ReadableStore, download_to_cache
from loraseg.errors import DatasetError

__all__ = ["open_dataset"]


def open_dataset(location: str | Path, *, skip_bad: bool = False) -> Dataset:
    """Open the dataset at a local path, ``file://`` or ``s3://`` URI.

    A dataset in an object store is copied to a local cache first.

    Args:
        location: The root of the dataset.
        skip_bad: Leave out unusable samples and list them in ``skipped``. Every file of a split
            is decoded when the split is first read.

    Raises:
        DatasetError: The folder does not exist, no reader knows its layout, or its class list is
            unusable.
        StoreError: The object store cannot be read.
    """
    text = str(location)
    scheme = urlsplit(text).scheme
    if scheme == "s3":
        from loraseg.storage import open_store  # imports boto3, which local folders do not need

        return _open_remote(open_store(text), skip_bad=skip_bad)
    folder = Path(unquote(urlsplit(text).path)) if scheme == "file" else Path(text)
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set[str]()
    return _find_reader(names, text).open(folder, skip_bad=skip_bad)


def _open_remote(store: ReadableStore, *, skip_bad: bool) -> Dataset:
    keys = list(store.list())
    reader = _find_reader({key.partition("/")[0] for key in keys if "/" in key}, store.uri)
    folder = download_to_cache(store, [key for key in keys if reader.is_dataset_key(key)])
    return reader.open(folder, skip_bad=skip_bad)


def _find_reader(names: Collection[str], location: str) -> Reader:
    for reader in READERS:
        if reader.recognises(names):
            return reader
    layouts = " or ".join(reader.layout for reader in READERS)
    raise DatasetError(f"{location}: not a dataset; expected {layouts}")
