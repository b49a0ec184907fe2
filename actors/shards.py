"""Committed synthetic pairs as a Ray Dataset."""

from collections.abc import Iterator
from typing import Any

import ray.data

from actors.resources import StorageCredentials, connect
from loraseg.data.shards.manifest import ShardEntry, ShardManifest
from loraseg.data.shards.pictures import decode_pair
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError
from loraseg.storage import open_store

__all__ = ["ray_dataset"]

_METADATA_COLUMNS = ("mask_name", "k", "kept")
_COLUMNS = ("image", "label", "height", "width", *_METADATA_COLUMNS)


def ray_dataset(uri: str) -> ray.data.Dataset:
    """Return the committed pairs with status ``ok``; data is read when it is used.

    Each shard is one task, which compares it with the manifest and decodes its images one by one.
    Rows have ``image`` uint8 (h, w, 3) RGB, ``label`` uint8 (h, w) with 255
    for no class (uint16 and 65535 with over 255 classes), ``pair_id``, ``mask_name``, ``k`` and
    ``kept``. A damaged shard fails the execution with an IntegrityError.

    Args:
        uri: URI of the synthetic dataset; every node must reach it.

    Raises:
        ConfigError: The URI is malformed.
        DatasetError: Nothing is committed, or no pair is ``ok``.
        IntegrityError: The manifest is damaged.
        StoreError: The store cannot be read.
    """
    dataset = ShardDataset.open(uri)
    shards = [entry for entry in dataset.manifest.shards if entry.statuses["ok"]]
    if not shards:
        raise DatasetError(f"{uri}: no pair is ok")
    connect()
    # One block per shard: Ray joins small blocks, and one task would read all shards.
    entries = ray.data.from_items(
        [{"shard": entry} for entry in shards], override_num_blocks=len(shards)
    )
    return entries.flat_map(
        _ShardReader(dataset.store.uri, dataset.manifest, StorageCredentials.from_environment())
    )


class _ShardReader:
    """Reads one shard with the driver's credentials."""

    def __init__(self, uri: str, manifest: ShardManifest, access: StorageCredentials) -> None:
        self._uri, self._manifest, self._access = uri, manifest, access

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._access.export()  # before the store is opened, which reads them
        dataset = ShardDataset(open_store(self._uri), self._manifest)
        entry: ShardEntry = row["shard"]
        classes = len(self._manifest.classes)
        for pair in dataset.read_shard(entry, columns=_COLUMNS):
            if pair.status == "ok":
                image, label = decode_pair(pair, classes, self._uri)
                metadata = {name: getattr(pair, name) for name in _METADATA_COLUMNS}
                yield {"pair_id": pair.pair_id, "image": image, "label": label, **metadata}
