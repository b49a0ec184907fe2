"""One generation of the catalog as a Parquet file: one row per version of an adapter."""

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.parquet_limits import ParquetLimits, open_checked_parquet
from loraseg.errors import IntegrityError
from loraseg.library.card import AdapterCard, check_digest
from loraseg.library.centroid import Centroid
from loraseg.storage.json_io import canonical_json

__all__ = ["CATALOG_SCHEMA", "CatalogEntry", "decode_snapshot", "encode_snapshot"]

_FORMAT = b"loraseg-catalog-1"
_CENTROID_TYPE = pa.struct(
    [
        ("encoder_id", pa.string()),
        ("normalised", pa.bool_()),
        ("vector", pa.list_(pa.float64())),
        ("count", pa.int64()),
        ("spread", pa.float64()),
    ]
)
_KEY_COLUMNS = ["name", "version", "record_digest"]
_SCALAR_FIELDS = ("encoder_id", "normalised", "count", "spread")
CATALOG_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("current", pa.bool_(), nullable=False),  # the name points to this version
        pa.field("digest", pa.string(), nullable=False),  # of the two weight files
        pa.field("record_digest", pa.string(), nullable=False),  # of adapters/<name>/<version>.json
        pa.field("size_bytes", pa.int64(), nullable=False),  # of all blobs
        pa.field("role", pa.string(), nullable=False),
        pa.field("base_name", pa.string(), nullable=False),
        pa.field("base_digest", pa.string(), nullable=False),
        pa.field("classes", pa.list_(pa.string()), nullable=False),
        pa.field("count", pa.int64()),  # training images, null if unknown
        pa.field("centroids", pa.list_(_CENTROID_TYPE), nullable=False),
        pa.field("card", pa.string(), nullable=False),  # the card's JSON without its centroids
    ],
    metadata={b"format": _FORMAT},
)
_LIMITS = ParquetLimits(group_rows=2**20, list_values=2**27, column_bytes=2**30)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """The catalog entry of one version of an adapter.

    Attributes:
        version: From 1, in the order of reservation; gaps are possible.
        digest: sha256 (hex) of the weight files, see :func:`loraseg.adapters.files_digest`.
        card: The whole card.
        current: Whether the name points to this version.
        record_digest: sha256 (hex) of ``adapters/<name>/<version>.json``.
        size_bytes: All files together.
        card_json: JSON of the card without its centroids, encoded once for all snapshots.
    """

    version: int
    digest: str
    card: AdapterCard
    current: bool
    record_digest: str
    size_bytes: int
    card_json: str = dataclasses.field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        """Encode the card, unless it was read from a snapshot."""
        if not self.card_json:
            bare = dataclasses.replace(self.card, centroids=())
            object.__setattr__(self, "card_json", canonical_json(bare.to_json()).decode())

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.card.name


def encode_snapshot(entries: Iterable[CatalogEntry]) -> bytes:
    """Return the Parquet file; the same entries give the same bytes."""
    ordered = sorted(entries, key=lambda e: (e.name, e.version))
    rows = [_to_row(entry) for entry in ordered]
    columns = [
        _centroid_column(ordered)
        if field.name == "centroids"
        else pa.array([row[field.name] for row in rows], field.type)
        for field in CATALOG_SCHEMA
    ]
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(columns, schema=CATALOG_SCHEMA)
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
    return buffer.getvalue()


def decode_snapshot(
    data: bytes, where: str, cached: Iterable[CatalogEntry] = ()
) -> tuple[CatalogEntry, ...]:
    """Read the Parquet file, ordered by name and version.

    Columns that this version does not know are ignored.

    Args:
        data: The file, from an untrusted source.
        where: Name of the file, for messages.
        cached: Entries of another generation; rows of the same version are not parsed again.

    Raises:
        IntegrityError: It is not a catalog snapshot, or a row is invalid.
    """
    file = open_checked_parquet(data, where, _LIMITS, schema=CATALOG_SCHEMA)
    if (found := file.metadata.get(b"format")) != _FORMAT:
        raise IntegrityError(
            f"{where}: catalog format {found!r}; this version of loraseg reads {_FORMAT!r}"
        )
    groups = range(len(file.group_rows))
    batches = [batch for group in groups for batch in file.batches(group, CATALOG_SCHEMA.names)]
    table = (
        pa.Table.from_batches(batches).select(CATALOG_SCHEMA.names)
        if batches
        else CATALOG_SCHEMA.empty_table()
    )
    try:
        entries, current = _parse_table(table, cached)
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{where}: {error}") from error
    return tuple(
        entry if entry.current == points else dataclasses.replace(entry, current=points)
        for entry, points in zip(entries, current, strict=True)
    )


def _parse_table(
    table: pa.Table, cached: Iterable[CatalogEntry]
) -> tuple[list[CatalogEntry], list[bool]]:
    """Return the entry of each row, from ``cached`` if it is there, and the column ``current``."""
    # The digest of a record covers its whole row except ``current``.
    known = {(entry.name, entry.version, entry.record_digest): entry for entry in cached}
    columns = [column.to_pylist() for column in table.select(_KEY_COLUMNS).columns]
    keys = list(zip(*columns, strict=True))
    new = [index for index, key in enumerate(keys) if key not in known]
    parsed = dict(zip(new, _parse_rows(table.take(pa.array(new, pa.int64()))), strict=True))
    entries = [parsed[index] if index in parsed else known[key] for index, key in enumerate(keys)]
    return entries, table.column("current").to_pylist()


def _parse_rows(table: pa.Table) -> Iterator[CatalogEntry]:
    rows = table.drop_columns(["centroids"]).to_pylist()
    lists = table.column("centroids").combine_chunks()
    for row, centroids in zip(rows, _parse_centroids(lists), strict=True):
        yield _parse_entry(row, centroids)


def _to_row(entry: CatalogEntry) -> dict[str, Any]:
    card = entry.card
    return {
        "name": card.name,
        "version": entry.version,
        "current": entry.current,
        "digest": entry.digest,
        "record_digest": entry.record_digest,
        "size_bytes": entry.size_bytes,
        "role": card.role,
        "base_name": card.base.name,
        "base_digest": card.base.digest,
        "classes": list(card.label_space),
        "count": None if card.training is None else card.training.images,
        "card": entry.card_json,
    }


def _parse_entry(row: dict[str, Any], centroids: tuple[Centroid, ...]) -> CatalogEntry:
    card = AdapterCard.from_bytes(row["card"].encode(), centroids)
    if card.name != row["name"] or row["version"] < 1:
        raise IntegrityError(f"row {row['name']!r}, version {row['version']}, is not valid")
    return CatalogEntry(
        version=row["version"],
        digest=check_digest(row["digest"], card.name),
        card=card,
        current=row["current"],
        record_digest=check_digest(row["record_digest"], card.name),
        size_bytes=row["size_bytes"],
        card_json=row["card"],
    )


def _centroid_column(entries: Sequence[CatalogEntry]) -> pa.ListArray:
    """Build the nested column from whole vectors; building it by number takes seconds."""
    centroids = [centroid for entry in entries for centroid in entry.card.centroids]
    sizes = [centroid.vector.size for centroid in centroids]
    flat = np.concatenate([np.empty(0), *(centroid.vector for centroid in centroids)])
    vectors = pa.ListArray.from_arrays(_offsets(sizes), pa.array(flat, pa.float64()))
    structs = pa.StructArray.from_arrays(
        [
            pa.array([centroid.encoder_id for centroid in centroids], pa.string()),
            pa.array([centroid.normalised for centroid in centroids], pa.bool_()),
            vectors,
            pa.array([centroid.count for centroid in centroids], pa.int64()),
            pa.array([centroid.spread for centroid in centroids], pa.float64()),
        ],
        fields=list(_CENTROID_TYPE),
    )
    return pa.ListArray.from_arrays(_offsets([len(e.card.centroids) for e in entries]), structs)


def _parse_centroids(lists: pa.ListArray) -> Iterator[tuple[Centroid, ...]]:
    structs = lists.flatten()
    vectors = structs.field("vector")
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    bounds = np.concatenate([[0], np.cumsum(vectors.value_lengths().to_numpy(False))])
    plain = pa.StructArray.from_arrays(
        [structs.field(name) for name in _SCALAR_FIELDS], names=list(_SCALAR_FIELDS)
    ).to_pylist()
    start = 0
    for length in lists.value_lengths().to_pylist():
        span = range(start, start + length)
        yield tuple(Centroid(vector=flat[bounds[i] : bounds[i + 1]], **plain[i]) for i in span)
        start += length


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), pa.int32())
