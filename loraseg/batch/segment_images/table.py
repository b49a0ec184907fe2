"""The Parquet table of explanations: one row per image."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.errors import IntegrityError
from loraseg.inference.request import SegmentResult

__all__ = [
    "SCHEMA",
    "CompletedRow",
    "Status",
    "encode_rows",
    "error_columns",
    "read_completed_rows",
    "result_columns",
    "to_printable",
]

# "bad_image": the bytes are not an image. "too_large": not read. "bad_key": no store accepts the
# key. "gone": deleted between listing and reading. "failed": not the image's fault; the next run
# repeats it.
Status = Literal["ok", "bad_image", "too_large", "bad_key", "gone", "failed"]

_ADAPTER = pa.struct(
    [
        ("name", pa.string()),
        ("version", pa.string()),
        ("digest", pa.string()),
        ("weight", pa.float64()),
        ("distance", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("etag", pa.string()),
        ("image_sha256", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("classes", pa.list_(pa.string())),
        ("shares", pa.list_(pa.float64())),
        ("mode", pa.string()),
        ("adapters", pa.list_(_ADAPTER)),
        ("mix", pa.string()),
        ("fallback", pa.string()),
        ("base", pa.string()),
        ("generation", pa.int64()),
        ("mask", pa.string()),
        ("mask_sha256", pa.string()),
    ]
)
_ID = re.compile(r"[0-9a-f]{32}")
_MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class CompletedRow:
    """The columns of a row that later runs use."""

    id: str
    etag: str
    status: str
    mask: str | None


def result_columns(result: SegmentResult, classes: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a segmented image; ``shares`` are fractions of its pixels."""
    labels, explanation = result.label_map, result.explanation
    counts = np.bincount(labels.reshape(-1), minlength=len(classes))
    return {
        "status": "ok",
        "width": labels.shape[1],
        "height": labels.shape[0],
        "shares": [float(count / labels.size) for count in counts],
        "mode": explanation.mode,
        "adapters": [
            {**asdict(used), "version": str(used.version)} for used in explanation.adapters
        ],
        "mix": explanation.mix,
        "fallback": explanation.fallback,
    }


def error_columns(status: Status, error: object) -> dict[str, Any]:
    """Return the columns of an image without a mask.

    Memory addresses are removed from the message: equal inputs must give equal rows.
    """
    return {
        "status": status,
        "error": to_printable(_MEMORY_ADDRESS.sub("", str(error)))[:_MAX_ERROR_CHARS],
    }


def to_printable(text: str) -> str:
    """Return text with lone surrogates escaped, which keys may have and UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def encode_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as Parquet; equal rows give equal bytes."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_completed_rows(data: bytes, where: str) -> list[CompletedRow]:
    """Read the columns that later runs use.

    Args:
        data: A Parquet file from :func:`encode_rows`.
        where: Its URI, for error messages.

    Raises:
        IntegrityError: The file is not such a table.
    """
    names = ["id", "etag", "status", "mask"]
    try:
        table = pq.read_table(io.BytesIO(data), columns=names)
        columns = [table.column(name).to_pylist() for name in names]
    except (pa.ArrowException, KeyError, OSError) as error:
        raise IntegrityError(f"{where}: not a table of explanations: {error}") from error
    rows = [CompletedRow(*row) for row in zip(*columns, strict=True)]
    if broken := [row.id for row in rows if not _ID.fullmatch(str(row.id))]:
        raise IntegrityError(f"{where}: not a table of explanations: id {broken[0]!r}")
    return rows
