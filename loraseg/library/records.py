"""The objects of a library other than snapshots: keys, blobs, records and HEAD."""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

from pydantic import Field

from loraseg.adapters.peft_io import CONFIG_FILE, WEIGHTS_FILE, files_digest
from loraseg.errors import IntegrityError
from loraseg.library.card import (
    MAX_CARD_BYTES,
    AdapterCard,
    CardFile,
    check_digest,
    check_name,
)
from loraseg.library.snapshot import CatalogEntry
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.json_io import canonical_json, parse_json_as

__all__ = [
    "HEAD_KEY",
    "AdapterRecord",
    "BlobInfo",
    "CatalogHead",
    "PublishedAdapter",
    "blob_key",
    "read_blob",
    "read_record",
    "read_snapshot",
    "record_key",
    "snapshot_key",
    "write_blobs",
    "write_record",
]

logger = logging.getLogger(__name__)

HEAD_KEY = "catalog/HEAD"
MAX_FILES = 64
MAX_FILE_BYTES = 4 * 2**30
_SCHEMA_VERSION = 1
_MAX_HEAD_BYTES = 4096
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CARD_FILE = "card.json"


def blob_key(digest: str) -> str:
    """Return the key of the file with this sha256."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def record_key(name: str, version: int) -> str:
    """Return the key of the record of a version."""
    return f"adapters/{name}/{version}.json"


def snapshot_key(generation: int) -> str:
    """Return the key of a generation, padded so that listings are in order."""
    return f"catalog/{generation:08d}.parquet"


@runtime_checkable
class PublishedAdapter(Protocol):
    """The fields that find and verify a published adapter; ``CatalogEntry`` has them."""

    @property
    def name(self) -> str:
        """The name of the adapter."""
        ...

    @property
    def version(self) -> int:
        """The version of the name."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 of the weight files."""
        ...

    @property
    def record_digest(self) -> str:
        """The sha256 of the record."""
        ...


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One file of an adapter."""

    sha256: str
    size_bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


@dataclass(frozen=True, slots=True)
class _HeadFile:
    """The values of ``catalog/HEAD``."""

    generation: Annotated[int, Field(ge=1)]
    sha256: str


@dataclass(frozen=True, slots=True)
class _RecordFile:
    """The values of ``adapters/<name>/<version>.json``."""

    schema: Literal[1]
    digest: str
    files: dict[str, BlobInfo]
    card: CardFile


@dataclass(frozen=True, slots=True)
class CatalogHead:
    """The pointer to a generation; ``sha256`` of its snapshot is None if unknown."""

    generation: int
    sha256: str | None

    @classmethod
    def empty(cls) -> "CatalogHead":
        """Return the head of an empty library."""
        return cls(0, None)

    @classmethod
    def from_snapshot(cls, generation: int, snapshot: bytes) -> "CatalogHead":
        """Return the head for a snapshot's bytes."""
        return cls(generation, _sha256(snapshot))

    def to_bytes(self) -> bytes:
        """Return the bytes of ``catalog/HEAD``."""
        return canonical_json(
            {
                "schema": _SCHEMA_VERSION,
                "generation": self.generation,
                "snapshot": snapshot_key(self.generation),
                "sha256": self.sha256,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "CatalogHead":
        """Read ``catalog/HEAD``.

        Raises:
            IntegrityError: The data was not written by :meth:`to_bytes`.
        """
        head = parse_json_as(
            _HeadFile, data, HEAD_KEY, max_bytes=_MAX_HEAD_BYTES, error=IntegrityError
        )
        return cls(head.generation, check_digest(head.sha256, HEAD_KEY))


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """The content of ``adapters/<name>/<version>.json``; only the key has the version."""

    card: AdapterCard
    digest: str
    files: Mapping[str, BlobInfo]

    @classmethod
    def from_files(
        cls, name: str, files: Mapping[str, bytes], card: AdapterCard
    ) -> "AdapterRecord":
        """Return the record of files to publish.

        Raises:
            IntegrityError: Name, card or files are not acceptable.
        """
        if check_name(name) != card.name:
            raise IntegrityError(f"cannot publish {name!r} with the card of {card.name!r}")
        _check_files(name, files)
        blobs = {file: BlobInfo(_sha256(data), len(data)) for file, data in sorted(files.items())}
        record = cls(card, files_digest(files), blobs)
        record.to_bytes()
        return record

    def to_bytes(self) -> bytes:
        """Return the record's JSON; equal records give equal bytes.

        Raises:
            IntegrityError: The card exceeds 4 MiB.
        """
        self.card.to_bytes()
        return canonical_json(
            {
                "schema": _SCHEMA_VERSION,
                "digest": self.digest,
                "files": {
                    file: {"sha256": blob.sha256, "size_bytes": blob.size_bytes}
                    for file, blob in self.files.items()
                },
                "card": self.card.to_json(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "AdapterRecord":
        """Read a record.

        Raises:
            IntegrityError: The data was not written by :meth:`to_bytes`.
        """
        record = parse_json_as(
            _RecordFile,
            data,
            where,
            max_bytes=2 * MAX_CARD_BYTES,
            error=IntegrityError,
            version=("schema", _SCHEMA_VERSION),
        )
        if not {CONFIG_FILE, WEIGHTS_FILE} <= record.files.keys():
            raise IntegrityError(f"{where}: lists {sorted(record.files)}, not both weight files")
        for name, blob in record.files.items():
            _check_file_name(name, where)
            check_digest(blob.sha256, where)
        return cls(
            AdapterCard.from_file(record.card), check_digest(record.digest, where), record.files
        )

    def to_entry(self, version: int) -> CatalogEntry:
        """Return the catalog's entry for the record under a version."""
        return CatalogEntry(
            version=version,
            digest=self.digest,
            card=self.card,
            current=True,
            record_digest=_sha256(self.to_bytes()),
            size_bytes=sum(blob.size_bytes for blob in self.files.values()),
        )


def write_blobs(store: ObjectStore, files: Mapping[str, bytes]) -> None:
    """Store files by content; an existing one is checked, and restored if it is damaged."""
    for data in files.values():
        digest = _sha256(data)
        key = blob_key(digest)
        if not store.put_if_absent(key, data) and _sha256(store.get(key)) != digest:
            logger.warning("%s was damaged and is being restored", key)
            store.put(key, data)


def write_record(store: ObjectStore, record: AdapterRecord, version: int) -> bool:
    """Store a record; False if the version has another record."""
    key = record_key(record.card.name, version)
    data = record.to_bytes()
    return store.put_if_absent(key, data) or store.get(key) == data


def read_blob(store: ObjectStore, digest: str) -> bytes:
    """Return the file with this sha256.

    Raises:
        IntegrityError: It is missing or damaged.
    """
    return _read_verified(store, blob_key(digest), digest)


def read_record(store: ObjectStore, entry: PublishedAdapter) -> AdapterRecord:
    """Return the record of a published adapter.

    Raises:
        IntegrityError: It is missing, damaged or of another adapter.
    """
    key = record_key(entry.name, entry.version)
    record = AdapterRecord.from_bytes(_read_verified(store, key, entry.record_digest), key)
    if record.card.name != entry.name or record.digest != entry.digest:
        raise IntegrityError(f"{key}: belongs to adapter {record.card.name!r}, {record.digest}")
    return record


def read_snapshot(store: ObjectStore, head: CatalogHead) -> bytes:
    """Return the snapshot of a generation, verified if the head knows its digest.

    Raises:
        IntegrityError: It is missing or damaged.
    """
    return _read_verified(store, snapshot_key(head.generation), head.sha256)


def _read_verified(store: ObjectStore, key: str, digest: str | None) -> bytes:
    try:
        data = store.get(key)
    except ObjectNotFoundError as error:
        raise IntegrityError(f"{store.uri}: {key} is missing") from error
    if digest is not None and _sha256(data) != digest:
        raise IntegrityError(f"{store.uri}: {key} is damaged: sha256 {_sha256(data)}, not {digest}")
    return data


def _check_files(name: str, files: Mapping[str, bytes]) -> None:
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in files]
    if missing:
        raise IntegrityError(f"adapter {name!r}: {', '.join(missing)} missing; got {sorted(files)}")
    if len(files) > MAX_FILES:
        raise IntegrityError(f"adapter {name!r}: {len(files)} files, at most {MAX_FILES}")
    for file, data in files.items():
        _check_file_name(file, f"adapter {name!r}")
        if file == _CARD_FILE:
            raise IntegrityError(f"adapter {name!r}: pass the card as card, not as {_CARD_FILE}")
        if len(data) > MAX_FILE_BYTES:
            raise IntegrityError(f"adapter {name!r}: {file}: {len(data)} bytes is too large")


def _check_file_name(name: str, where: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise IntegrityError(f"{where}: file name {name[:140]!r} is not allowed")
    return name


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
