"""The manifest of a synthetic dataset: its commit point.

Readers see only the shards that it names, so one conditional write makes any number of shards
visible at once. It holds no time stamp: equal inputs give equal bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ConfigDict

from loraseg.data.shards.schema import PairStatus, check_classes
from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.json_io import parse_json_as, readable_json

__all__ = ["MANIFEST_KEY", "SHARDS_PREFIX", "ShardEntry", "ShardManifest", "read_manifest"]

MANIFEST_KEY = "manifest.json"
SHARDS_PREFIX = "shards"
_FORMAT = 1
_STATUSES = get_args(PairStatus)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_KEY = re.compile(rf"{SHARDS_PREFIX}/[0-9a-f]{{1,128}}\.parquet")
# About 900,000 shards.
_MAX_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A committed shard.

    Attributes:
        file: The key, ``shards/<hex digits>.parquet``.
        sha256: Digest of the file.
        size_bytes: Size of the file.
        rows: Number of rows.
        statuses: Number of rows by status, for all four statuses.

    Raises:
        DatasetError: A value is of another form, or the statuses do not add up to ``rows``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    sha256: str
    size_bytes: int
    rows: int
    statuses: Mapping[str, int]

    def __post_init__(self) -> None:
        """Check the values, and add the statuses without rows."""
        if not _SHARD_KEY.fullmatch(self.file):
            raise DatasetError(f"shard {self.file[:80]!r}: expected {SHARDS_PREFIX}/<hex>.parquet")
        if not _SHA256.fullmatch(self.sha256):
            raise DatasetError(f"{self.file}: sha256: got {self.sha256[:80]!r}")
        if unknown := set(self.statuses) - set(_STATUSES):
            raise DatasetError(f"{self.file}: status {min(unknown)[:40]!r} is not known")
        if self.size_bytes < 0 or any(count < 0 for count in self.statuses.values()):
            raise DatasetError(f"{self.file}: a size or count below 0")
        if sum(self.statuses.values()) != self.rows:
            raise DatasetError(f"{self.file}: {self.rows} rows, not the sum of its statuses")
        full = {status: self.statuses.get(status, 0) for status in _STATUSES}
        object.__setattr__(self, "statuses", full)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "rows": self.rows,
            "statuses": dict(self.statuses),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """The committed content of a synthetic dataset.

    Attributes:
        generation: Number of commits.
        classes: Class names, id = index.
        masks: Number of masks in the committed shards.
        shards: The shards, sorted by file.
        plans: sha256 of the plans, which assign masks to shards, in the order of use.
        dataset_sha256: Of the bytes of ``dataset.json``.

    Raises:
        DatasetError: A value is of another form, or two shards are one file.
    """

    generation: int
    classes: tuple[str, ...]
    masks: int
    shards: tuple[ShardEntry, ...]
    plans: tuple[str, ...]
    dataset_sha256: str

    def __post_init__(self) -> None:
        """Check and sort."""
        check_classes(self.classes)
        if self.generation < 0 or self.masks < 0:
            raise DatasetError("manifest: generation or masks below 0")
        for digest in (*self.plans, self.dataset_sha256):
            if not _SHA256.fullmatch(digest):
                raise DatasetError(f"manifest: {digest[:80]!r} is not a sha256")
        if len({entry.file for entry in self.shards}) != len(self.shards):
            raise DatasetError("manifest: a shard is listed twice")
        ordered = tuple(sorted(self.shards, key=lambda entry: entry.file))
        object.__setattr__(self, "shards", ordered)

    @property
    def statuses(self) -> dict[str, int]:
        """Number of rows by status, for all four statuses."""
        return {
            status: sum(entry.statuses[status] for entry in self.shards) for status in _STATUSES
        }

    @property
    def pairs(self) -> int:
        """Number of ``ok`` pairs."""
        return self.statuses["ok"]

    def to_bytes(self) -> bytes:
        """Return the file; equal manifests give equal bytes."""
        content = {
            "format": _FORMAT,
            "generation": self.generation,
            "classes": list(self.classes),
            "masks": self.masks,
            "pairs": self.pairs,
            "statuses": self.statuses,
            "shards": [entry.to_json() for entry in self.shards],
            "plans": list(self.plans),
            "dataset_sha256": self.dataset_sha256,
        }
        return readable_json(content)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "ShardManifest":
        """Read ``manifest.json``.

        Args:
            data: The file, from an untrusted source.
            where: Name of the file, for messages.

        Raises:
            IntegrityError: The file is not a manifest, or its sums are wrong.
        """
        where = f"{where}: not a manifest of shards"
        file = parse_json_as(
            _ManifestFile,
            data,
            where,
            max_bytes=_MAX_BYTES,
            error=IntegrityError,
            version=("format", _FORMAT),
        )
        try:
            manifest = cls(
                generation=file.generation,
                classes=file.classes,
                masks=file.masks,
                shards=file.shards,
                plans=file.plans,
                dataset_sha256=file.dataset_sha256,
            )
        except DatasetError as error:
            raise IntegrityError(f"{where}: {error}") from error
        if (file.pairs, file.statuses) != (manifest.pairs, manifest.statuses):
            raise IntegrityError(f"{where}: pairs or statuses are not the sums over the shards")
        return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class _ManifestFile:
    """The values of ``manifest.json``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    generation: int
    classes: tuple[str, ...]
    masks: int
    pairs: int
    statuses: dict[str, int]
    shards: tuple[ShardEntry, ...]
    plans: tuple[str, ...]
    dataset_sha256: str


def read_manifest(store: ObjectStore) -> tuple[ShardManifest, str] | None:
    """Return the manifest and its etag; None if nothing is committed.

    Raises:
        IntegrityError: The manifest is damaged.
        StoreError: The store cannot be read.
    """
    try:
        data, etag = store.get_with_etag(MANIFEST_KEY)
    except ObjectNotFoundError:
        return None
    return ShardManifest.from_bytes(data, f"{store.uri}/{MANIFEST_KEY}"), etag
