"""Synthetic pairs as Parquet: one row per pair, or per mask without a pair.

A file holds plain columns of text, numbers and bytes, so that anything that reads Parquet reads
it; images, labels and masks are whole PNG (or JPEG) files. The class names stand in the file's
metadata under ``loraseg``, as JSON.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.parquet_limits import CheckedParquet, ParquetLimits, open_checked_parquet
from loraseg.errors import DatasetError, IntegrityError
from loraseg.image_limits import MAX_PIXELS
from loraseg.storage.json_io import parse_json_as

__all__ = [
    "MAX_CLASSES",
    "SHARD_SCHEMA",
    "PairRow",
    "PairStatus",
    "check_classes",
    "decode_shard",
    "encode_shard",
    "read_rows",
    "rows_digest",
]

PairStatus = Literal["ok", "dropped", "bad_mask", "duplicate"]

MAX_CLASSES = 65_535
_FORMAT = 1
_STATUSES = frozenset(get_args(PairStatus))
_METADATA_KEY = b"loraseg"
# Reading a row decodes its group; reading all rows holds one group besides the file. Both bounds
# are part of the format, because they decide where the rows are cut into groups.
_GROUP_ROWS = 64
_GROUP_BYTES = 64 * 2**20
_HEX = re.compile(r"[0-9a-f]{1,64}")
_MAX_NAME_LENGTH = 1024
_KEY_COLUMNS = ("pair_id", "status", "mask_name")
_REQUIRED_IF_OK = ("pair_id", "image", "label", "height", "width")
_BYTE_COLUMNS = ("image", "label", "mask", "predicted")
# PNG does not compress further.
_COMPRESSION = {"prompt": "zstd", "lineage": "zstd"}

_ADAPTER_LIST = pa.list_(
    pa.struct([("name", pa.string()), ("digest", pa.string()), ("weight", pa.float64())])
)
SHARD_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("mask_name", pa.string()),
        ("mask_id", pa.string()),
        ("k", pa.int32()),
        ("siblings", pa.int32()),
        ("image", pa.binary()),
        ("label", pa.binary()),
        ("mask", pa.binary()),
        ("predicted", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("generator", pa.string()),
        ("adapters", _ADAPTER_LIST),
        ("heads", _ADAPTER_LIST),
        ("kept", pa.float64()),
        ("kept_by_class", pa.list_(pa.float64())),
        ("lineage", pa.string()),
        ("code_revision", pa.string()),
    ]
)
_LIMITS = ParquetLimits(
    group_rows=_GROUP_ROWS,
    list_values=_GROUP_ROWS * 2**16,  # a value for each of 65,535 classes
)
_MAX_METADATA_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class _ShardMetadata:
    """The JSON in the metadata of a shard."""

    format: int
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairRow:
    """One pair, or one mask without a pair. The columns of a shard, see :data:`SHARD_SCHEMA`.

    Attributes:
        pair_id: Hex digits; None for a mask that made no pair.
        status: ``ok``; ``dropped``, removed by the filter; ``bad_mask``; or ``duplicate``, a
            mask that is in the source twice.
        reason: Why it is not ``ok``; None if it is.
        mask_name: Name in the source, printable.
        mask_id: sha256 (hex) of the mask's ids and shape.
        k: Number of the image of its mask, from 0.
        siblings: Number of images of the mask that voted.
        image: PNG or JPEG, RGB.
        label: PNG of class ids. Pixels that were filtered, or had no class in the mask, are 255;
            with over 255 classes it has 16 bits and they are 65535.
        mask: PNG like ``label``, the condition of the generator.
        predicted: PNG like ``label``, the prediction of the segmenter.
        height: Of all four pictures, pixels.
        width: Of all four pictures, pixels.
        seed: Of the image's noise.
        prompt: What the text encoders read.
        generator: Digest (hex) of all that decides what a mask and a seed become.
        adapters: (name, digest, weight) of the adapters of all images.
        heads: The same for additional adapters of this image.
        kept: Share of the mask's labelled pixels that kept their label, in [0, 1].
        kept_by_class: The same by class, None where the mask has no pixel of the class; empty
            where there was no vote.
        lineage: JSON object with everything needed to reproduce the pair.
        code_revision: Revision of the code.
    """

    pair_id: str | None
    status: PairStatus
    reason: str | None
    mask_name: str
    mask_id: str | None
    k: int | None
    siblings: int | None
    image: bytes | None
    label: bytes | None
    mask: bytes | None
    predicted: bytes | None
    height: int | None
    width: int | None
    seed: int | None
    prompt: str | None
    generator: str | None
    adapters: tuple[tuple[str, str, float], ...]
    heads: tuple[tuple[str, str, float], ...]
    kept: float | None
    kept_by_class: tuple[float | None, ...]
    lineage: str | None
    code_revision: str | None


_NAMES = tuple(field.name for field in fields(PairRow))
_EMPTY_ROW: dict[str, Any] = {
    **dict.fromkeys(_NAMES),
    "adapters": (),
    "heads": (),
    "kept_by_class": (),
}


def encode_shard(rows: Sequence[PairRow], classes: Sequence[str]) -> bytes:
    """Return the rows as a Parquet file, in their order.

    Equal rows give equal bytes with one version of pyarrow; :func:`rows_digest` with any.

    Raises:
        DatasetError: A row or the class list breaks the rules of the format, or two pairs have
            one ``pair_id``.
    """
    names = check_classes(classes)
    seen: set[str] = set()
    for row in rows:
        if problem := _row_error(row, len(names), _NAMES):
            raise DatasetError(f"shard: mask {row.mask_name!r}, k {row.k}: {problem}")
        if row.pair_id in seen:
            raise DatasetError(f"shard: pair {row.pair_id} is there twice")
        if row.pair_id is not None:
            seen.add(row.pair_id)
    about = json.dumps({"format": _FORMAT, "classes": names}, ensure_ascii=False)
    sink = pa.BufferOutputStream()
    layout: dict[str, Any] = {  # pyarrow's annotations are too narrow
        "compression": {name: _COMPRESSION.get(name, "none") for name in _NAMES},
        "write_statistics": ["pair_id", "status"],
        "use_dictionary": False,
        "store_schema": False,  # the types of Parquet suffice
    }
    try:
        with pq.ParquetWriter(sink, SHARD_SCHEMA, **layout) as writer:
            writer.add_key_value_metadata({_METADATA_KEY: about.encode()})
            for group in _row_groups(rows):
                plain = [_to_record(row) for row in group]
                writer.write_table(pa.Table.from_pylist(plain, schema=SHARD_SCHEMA), len(plain))
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise DatasetError(f"shard: a value that the format cannot hold: {error}") from error
    return sink.getvalue().to_pybytes()


def decode_shard(data: bytes, where: str) -> list[PairRow]:
    """Return all rows of a file that :func:`encode_shard` made.

    Args:
        data: The file, from an untrusted source.
        where: Name of the file, for messages.

    Raises:
        IntegrityError: It is no such file, unfolds into more than its own size allows, or a row
            breaks the rules of the format.
    """
    return list(read_rows(data, where))


def read_rows(
    data: bytes,
    where: str,
    *,
    columns: Collection[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Iterator[PairRow]:
    """Yield the rows in order, a batch in memory at a time.

    Args:
        data: The file, from an untrusted source.
        where: Name of the file, for messages.
        columns: The columns to read besides ``pair_id``, ``status`` and ``mask_name``, by default
            all; the others are None or empty.
        classes: Required class names; None for any.

    Raises:
        DatasetError: There is no such column.
        IntegrityError: As in :func:`decode_shard`, or the classes are others.
    """
    columns_to_read = _select_columns(columns)
    file, names = _open_shard(data, where)
    if classes is not None and tuple(classes) != names:
        raise IntegrityError(f"{where}: its classes are not those of the dataset")
    for group in range(len(file.group_rows)):
        for batch in file.batches(group, columns_to_read):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise IntegrityError(f"{where}: not a readable shard: {error}") from error
            for record in records:
                yield _parse_row(record, len(names), columns_to_read, where)


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of a shard or manifest if they are valid.

    Raises:
        DatasetError: None or over 65,535, or one is doubled, empty or not printable.
    """
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise DatasetError(f"classes: got {len(classes)}, expected 1 to {MAX_CLASSES}")
    for name in classes:
        if not name.strip() or not name.isprintable():
            raise DatasetError(f"classes: {name[:80]!r}, expected printable text")
    if len(set(classes)) != len(classes):
        raise DatasetError("classes: a name is there twice")
    return tuple(classes)


def rows_digest(rows: Iterable[PairRow]) -> str:
    """Return the sha256 (hex) over rows, in any order, without their code revision.

    It covers every column but ``code_revision``, also where that stands in the lineage.
    """
    parts = sorted(
        (row.pair_id is None, row.pair_id or "", row.mask_name, _row_digest(row)) for row in rows
    )
    digest = sha256(b"rows")
    for _, _, _, part in parts:
        digest.update(part)
    return digest.hexdigest()


def _row_groups(rows: Sequence[PairRow]) -> Iterator[list[PairRow]]:
    group: list[PairRow] = []
    size_bytes = 0
    for row in rows:
        group.append(row)
        size_bytes += sum(len(getattr(row, name) or b"") for name in _BYTE_COLUMNS)
        if len(group) == _GROUP_ROWS or size_bytes >= _GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _to_record(row: PairRow) -> dict[str, Any]:
    plain = {name: getattr(row, name) for name in _NAMES}
    for name in ("adapters", "heads"):
        plain[name] = [dict(zip(("name", "digest", "weight"), u, strict=True)) for u in plain[name]]
    plain["kept_by_class"] = list(row.kept_by_class)
    return plain


def _parse_row(
    record: dict[str, Any], classes: int, columns: Collection[str], where: str
) -> PairRow:
    for name in {"adapters", "heads"} & record.keys():
        used = record[name] or ()
        if any(one is None or None in one.values() for one in used):
            raise IntegrityError(f"{where}: {name}: a null")
        record[name] = tuple((one["name"], one["digest"], one["weight"]) for one in used)
    if "kept_by_class" in record:
        record["kept_by_class"] = tuple(record["kept_by_class"] or ())
    if record["status"] not in _STATUSES or record["mask_name"] is None:
        raise IntegrityError(
            f"{where}: status {str(record['status'])[:40]!r} of mask "
            f"{str(record['mask_name'])[:80]!r}; expected one of {', '.join(sorted(_STATUSES))}"
        )
    row = PairRow(**{**_EMPTY_ROW, **record})
    if problem := _row_error(row, classes, columns):
        raise IntegrityError(f"{where}: mask {row.mask_name[:80]!r}, k {row.k}: {problem}")
    return row


def _row_error(row: PairRow, classes: int, columns: Collection[str]) -> str | None:
    """Return the first fault of a row that has ``columns``; None if it is valid."""
    if row.status not in _STATUSES:
        return f"status: got {row.status!r}, expected one of {', '.join(sorted(_STATUSES))}"
    if not row.mask_name.isprintable() or not 1 <= len(row.mask_name) <= _MAX_NAME_LENGTH:
        return f"mask_name: expected 1 to {_MAX_NAME_LENGTH} printable characters"
    for name in ("pair_id", "mask_id", "generator"):
        value = getattr(row, name)
        if value is not None and not _HEX.fullmatch(value):
            return f"{name}: got {value[:80]!r}, expected up to 64 hex digits"
    if row.status == "ok":
        absent = [
            name for name in _REQUIRED_IF_OK if name in columns and getattr(row, name) is None
        ]
        if absent:
            return f"{', '.join(absent)}: missing, although the status is ok"
    if "reason" in columns and (row.reason is None) != (row.status == "ok"):
        return f"reason: got {row.reason!r} with the status {row.status}"
    return _number_error(row, classes)


def _number_error(row: PairRow, classes: int) -> str | None:
    sides = [side for side in (row.height, row.width) if side is not None]
    if any(side < 1 for side in sides) or (len(sides) == 2 and sides[0] * sides[1] > MAX_PIXELS):
        return f"height x width: got {row.height} x {row.width}, expected up to {MAX_PIXELS} pixels"
    if any(value is not None and value < 0 for value in (row.k, row.siblings, row.seed)):
        return f"k, siblings, seed: got {row.k}, {row.siblings}, {row.seed}, expected none below 0"
    if len(row.kept_by_class) not in (0, classes):
        return f"kept_by_class: got {len(row.kept_by_class)} values for {classes} classes"
    if any(kept is not None and not 0 <= kept <= 1 for kept in (row.kept, *row.kept_by_class)):
        return "kept, kept_by_class: a share outside [0, 1]"
    if not all(math.isfinite(weight) for _, _, weight in row.adapters + row.heads):
        return "adapters, heads: a weight is not finite"
    return None


def _select_columns(columns: Collection[str] | None) -> tuple[str, ...]:
    if columns is None:
        return _NAMES
    if unknown := sorted(set(columns) - set(_NAMES)):
        raise DatasetError(f"shard: no column {unknown[0]!r} among {', '.join(_NAMES)}")
    return tuple(name for name in _NAMES if name in columns or name in _KEY_COLUMNS)


def _open_shard(data: bytes, where: str) -> tuple[CheckedParquet, tuple[str, ...]]:
    """Check a file except for its rows; return it with the class names."""
    file = open_checked_parquet(data, where, _LIMITS, schema=SHARD_SCHEMA)
    if unknown := sorted(set(file.schema.names) - set(_NAMES)):
        raise IntegrityError(f"{where}: not a shard: unknown column {unknown[0][:80]!r}")
    metadata = parse_json_as(
        _ShardMetadata,
        file.metadata.get(_METADATA_KEY, b"null"),
        f"{where}: not a shard: metadata under 'loraseg'",
        max_bytes=_MAX_METADATA_BYTES,
        error=IntegrityError,
        version=("format", _FORMAT),
    )
    try:
        return file, check_classes(metadata.classes)
    except DatasetError as error:
        raise IntegrityError(f"{where}: not a shard: {error}") from error


def _row_digest(row: PairRow) -> bytes:
    values = {
        name: sha256(value).hexdigest() if isinstance(value, bytes) else value
        for name in _NAMES
        if name not in ("code_revision", "lineage") and (value := getattr(row, name)) is not None
    }
    text = json.dumps(
        [values, _comparable_lineage(row.lineage)], sort_keys=True, separators=(",", ":")
    )
    return sha256(text.encode()).digest()


def _comparable_lineage(text: str | None) -> Any:
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError):
        return text
    return {**content, "code_revision": None} if isinstance(content, dict) else content
