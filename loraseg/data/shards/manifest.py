"""The manifest of a synthetic dataset: its commit point.

Readers see the shards that it names and no others, so one conditional write of it makes any number
of shards visible at once. It holds no time of day: equal inputs give equal bytes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast, get_args

from loraseg.data.shards.schema import PairStatus, check_classes
from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore

__all__ = ["MANIFEST_KEY", "SHARDS_PREFIX", "ShardEntry", "ShardManifest", "read_manifest"]

MANIFEST_KEY = "manifest.json"
SHARDS_PREFIX = "shards"
_FORMAT = 1
_STATUSES = get_args(PairStatus)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_KEY = re.compile(rf"{SHARDS_PREFIX}/[0-9a-f]{{1,128}}\.parquet")
_KEYS = {
    "format",
    "generation",
    "classes",
    "masks",
    "pairs",
    "statuses",
    "shards",
    "plans",
    "dataset_sha256",
}
_ENTRY_KEYS = {"file", "sha256", "size_bytes", "rows", "statuses"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard that is committed.

    Attributes:
        file: Its key, ``shards/<hex digits>.parquet``.
        sha256: Of its bytes.
        size_bytes: Its size.
        rows: How many rows it has.
        statuses: How many of them have which status; all four are named.

    Raises:
        DatasetError: A value is of another form, or the statuses do not add up to ``rows``.
    """

    file: str
    sha256: str
    size_bytes: int
    rows: int
    statuses: Mapping[str, int]

    def __post_init__(self) -> None:
        """Check, and name the statuses that no row has."""
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
    """All that is committed of a synthetic dataset.

    Attributes:
        generation: Counts the commits.
        classes: Class names, id = place.
        masks: How many masks the committed parts hold.
        shards: Sorted by file, whatever their order was.
        plans: sha256 of the plans that say which mask is in which part, in the order of use.
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
            raise DatasetError("manifest: a shard is there twice")
        ordered = tuple(sorted(self.shards, key=lambda entry: entry.file))
        object.__setattr__(self, "shards", ordered)

    @property
    def statuses(self) -> dict[str, int]:
        """How many rows have which status; all four are named."""
        return {
            status: sum(entry.statuses[status] for entry in self.shards) for status in _STATUSES
        }

    @property
    def pairs(self) -> int:
        """How many pairs are ``ok``."""
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
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "ShardManifest":
        """Read what :meth:`to_bytes` wrote.

        Args:
            data: The file; it may come from anybody.
            where: What to call it in errors.

        Raises:
            IntegrityError: It is no manifest, or its numbers disagree.
        """
        try:
            return _parse_manifest(
                json.loads(data, parse_constant=_reject_number, parse_float=_reject_number)
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{where}: not a manifest of shards: {error}") from error


def read_manifest(store: ObjectStore) -> tuple[ShardManifest, str] | None:
    """Return what is committed and the manifest's etag; None if nothing is.

    Raises:
        IntegrityError: The manifest is damaged.
        StoreError: The store cannot be read.
    """
    try:
        data, etag = store.get_with_etag(MANIFEST_KEY)
    except ObjectNotFoundError:
        return None
    return ShardManifest.from_bytes(data, f"{store.uri}/{MANIFEST_KEY}"), etag


def _parse_manifest(content: Any) -> ShardManifest:
    values = _require_keys(content, _KEYS, "the manifest")
    if values["format"] != _FORMAT:
        raise DatasetError(f"format {str(values['format'])[:40]}, expected {_FORMAT}")
    manifest = ShardManifest(
        generation=_typed_value(values, "generation", int),
        classes=tuple(_string_list(values, "classes")),
        masks=_typed_value(values, "masks", int),
        shards=tuple(_parse_entry(entry) for entry in _typed_value(values, "shards", list)),
        plans=tuple(_string_list(values, "plans")),
        dataset_sha256=_typed_value(values, "dataset_sha256", str),
    )
    if values["pairs"] != manifest.pairs or values["statuses"] != manifest.statuses:
        raise DatasetError("pairs or statuses are not the sums over the shards")
    return manifest


def _parse_entry(content: Any) -> ShardEntry:
    values = _require_keys(content, _ENTRY_KEYS, "a shard")
    statuses = _typed_value(values, "statuses", dict)
    return ShardEntry(
        file=_typed_value(values, "file", str),
        sha256=_typed_value(values, "sha256", str),
        size_bytes=_typed_value(values, "size_bytes", int),
        rows=_typed_value(values, "rows", int),
        statuses={status: _typed_value(statuses, status, int) for status in statuses},
    )


def _require_keys(content: Any, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DatasetError(f"{what} is {type(content).__name__}, expected an object")
    values = cast(dict[str, Any], content)
    if different := keys ^ values.keys():
        raise DatasetError(f"{what}: key {min(different)[:40]!r} is missing or not known")
    return values


def _typed_value(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values[key]
    if type(value) is not kind:  # a bool is no number here
        raise DatasetError(f"{key[:40]}: got {type(value).__name__}, expected {kind.__name__}")
    return value


def _string_list(values: Mapping[str, Any], key: str) -> list[str]:
    texts = _typed_value(values, key, list)
    if not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{key}: expected a list of texts")
    return texts


def _reject_number(text: str) -> NoReturn:
    raise DatasetError(f"{text[:40]}: expected whole numbers")
