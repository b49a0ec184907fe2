"""Which masks are one unit of work: the same whatever the order, the workers and the accidents."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.batch.synthesize.mask_sources import MaskRef, MaskSource, is_parquet
from loraseg.errors import DatasetError, IntegrityError
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import resize_mask

__all__ = [
    "MaskWorkUnit",
    "PlanHistory",
    "ScannedMask",
    "decode_plan",
    "encode_plan",
    "plan_units",
    "scan_masks",
]

T = TypeVar("T")

_READ_THREADS = 8
_MAX_PLAN_BYTES = 2 * 1024**3
_PLAN_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("mask_id", pa.string()),
        ("name", pa.string()),
        ("file", pa.string()),
        ("row", pa.int32()),
        ("last", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class ScannedMask:
    """A mask of the source after a first look.

    Attributes:
        ref: Where it is.
        mask_id: Digest of its ids; None if it cannot be read.
        reason: Why no image is made of it: what is wrong, or whose copy it is; else None.
    """

    ref: MaskRef
    mask_id: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class MaskWorkUnit:
    """A unit of work.

    Attributes:
        masks: Its masks.
        first_image: The first image k of each.
        last_image: The last one.
        earlier_shards: Shards with images 0 to ``first_image`` - 1 of the same masks, which vote
            as well.
    """

    masks: tuple[ScannedMask, ...]
    first_image: int
    last_image: int
    earlier_shards: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """32 hex digits that stand for what the part is made of."""
        rows = [[one.mask_id, one.reason, *_ref_columns(one.ref)] for one in self.masks]
        text = json.dumps(
            [rows, self.first_image, self.last_image, self.earlier_shards], separators=(",", ":")
        )
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(slots=True)
class PlanHistory:
    """What earlier runs have made.

    Attributes:
        last_image: By mask id, the last image there is.
        shards: By mask id, the shards that hold its images, oldest first.
        first_owner: By mask id, the mask that its images were made of.
        rejected: Masks of which no image was to be made. Both as a plan holds them.
    """

    last_image: dict[str, int] = field(default_factory=dict[str, int])
    shards: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    first_owner: dict[str, MaskRef] = field(default_factory=dict[str, MaskRef])
    rejected: set[MaskRef] = field(default_factory=set[MaskRef])

    def add(self, shard: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of the rows of one part of a plan."""
        for row in rows:
            mask = MaskRef(row["name"], row["file"], row["row"])
            if row["last"] < 0:
                self.rejected.add(mask)
                continue
            mask_id = row["mask_id"]
            self.first_owner.setdefault(mask_id, mask)
            self.last_image[mask_id] = max(row["last"], self.last_image.get(mask_id, -1))
            self.shards[mask_id] = (*self.shards.get(mask_id, ()), shard)


def scan_masks(
    source: MaskSource,
    masks: Sequence[MaskRef],
    history: PlanHistory,
    *,
    classes: int,
    size: tuple[int, int] | None,
) -> list[ScannedMask]:
    """Read all masks once and find out what each is; of equal ones only one counts.

    That is the one of which earlier runs made images, and else the first.

    Args:
        source: Of the masks.
        masks: In the order of the source.
        history: What earlier runs have made.
        classes: Ids that may occur.
        size: Of the images; masks are compared as large as that. None for their own size.

    Raises:
        StoreError: The store cannot be read.
    """

    def look(mask: MaskRef) -> ScannedMask:
        try:
            ids = source.read(mask, classes=classes)
            return ScannedMask(mask, mask_digest(resize_mask(ids, size) if size else ids))
        except DatasetError as error:
            return ScannedMask(mask, None, str(error))

    found: dict[MaskRef, ScannedMask] = {}
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="survey") as pool:
        for some in _group_by_file(masks):
            found.update(zip(some, pool.map(look, some), strict=True))
    return _drop_duplicates([found[mask] for mask in masks], history)


def _group_by_file(masks: Sequence[MaskRef]) -> Iterator[Sequence[MaskRef]]:
    """Yield masks in pieces, so that no more than these wait for a reader at a time.

    Whatever the names, a file of many masks is done with before the next one is fetched.
    """
    ordered = sorted(masks, key=lambda mask: (mask.file, mask.row))
    for _, same in groupby(ordered, key=lambda mask: is_parquet(mask.file) and mask.file):
        yield from _chunks(list(same), 1024)


def _drop_duplicates(scanned: Sequence[ScannedMask], history: PlanHistory) -> list[ScannedMask]:
    """Refuse all but one of the masks with equal ids."""
    counts: dict[str, MaskRef] = {}
    for one in scanned:
        if one.mask_id is None:
            continue
        if history.first_owner.get(one.mask_id) == _plan_ref(one.ref):
            counts[one.mask_id] = one.ref
        else:
            counts.setdefault(one.mask_id, one.ref)

    def told(one: ScannedMask) -> ScannedMask:
        if one.mask_id is None or (twin := counts[one.mask_id]) == one.ref:
            return one
        place = f" ({twin.file}, row {twin.row})" if twin.name == one.ref.name else ""
        return ScannedMask(one.ref, one.mask_id, f"the same ids as {twin.name!r}{place}")

    return [told(one) for one in scanned]


def plan_units(
    scanned: Sequence[ScannedMask], images: int, size: int, history: PlanHistory
) -> Iterator[MaskWorkUnit]:
    """Cut what is missing into parts.

    Args:
        scanned: From :func:`survey`.
        images: K.
        size: Masks of a part.
        history: What earlier runs have made.
    """
    fresh = [one for one in scanned if _is_new(one, history)]
    fresh.sort(key=lambda one: (one.reason is not None, one.mask_id or "", one.ref))
    for some in _chunks(fresh, size):
        yield MaskWorkUnit(tuple(some), 0, images - 1)
    short = [
        one
        for one in scanned
        if one.reason is None
        and one.mask_id
        and 0 <= history.last_image.get(one.mask_id, images) + 1 < images
    ]
    short.sort(key=lambda one: _earlier_images(one, history))
    # Masks that went through the same shards have them in common again.
    for (older, last), some in groupby(short, key=lambda one: _earlier_images(one, history)[:2]):
        for chunk in _chunks(list(some), size):
            yield MaskWorkUnit(tuple(chunk), last + 1, images - 1, older)


def encode_plan(units: Iterable[MaskWorkUnit]) -> bytes:
    """Return a Parquet file that says which mask is in which part; equal parts, equal bytes."""
    rows = sorted(
        (part.id, one.mask_id or "", *_ref_columns(_plan_ref(one.ref)), _last_image(one, part))
        for part in units
        for one in part.masks
    )
    plain = [dict(zip(_PLAN_SCHEMA.names, row, strict=True)) for row in rows]
    table = pa.Table.from_pylist(plain, _PLAN_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_plan(data: bytes, where: str, history: PlanHistory) -> None:
    """Add what a plan says to what is known to be done.

    Raises:
        IntegrityError: It is no plan.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        groups = range(file.metadata.num_row_groups)
        if sum(file.metadata.row_group(i).total_byte_size for i in groups) > _MAX_PLAN_BYTES:
            raise IntegrityError(f"{where}: unpacked, the plan is larger than 2 GiB")
        table = file.read()
        if not table.schema.equals(_PLAN_SCHEMA):
            raise IntegrityError(
                f"{where}: columns {table.schema.names}, expected {_PLAN_SCHEMA.names}"
            )
        for part, rows in groupby(table.to_pylist(), key=lambda row: row["part"]):
            history.add(f"shards/{part}.parquet", rows)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{where}: not a plan: {error}") from error


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_new(scanned: ScannedMask, history: PlanHistory) -> bool:
    if scanned.reason is not None or scanned.mask_id is None:
        return _plan_ref(scanned.ref) not in history.rejected
    return scanned.mask_id not in history.last_image


def _earlier_images(scanned: ScannedMask, history: PlanHistory) -> tuple[tuple[str, ...], int, str]:
    known = scanned.mask_id or ""
    return history.shards[known], history.last_image[known], known


def _ref_columns(ref: MaskRef) -> tuple[str, str, int]:
    return ref.name, ref.file, ref.row


def _last_image(scanned: ScannedMask, unit: MaskWorkUnit) -> int:
    return -1 if scanned.reason else unit.last_image


def _plan_ref(ref: MaskRef) -> MaskRef:
    """Return a mask as Parquet can hold it: keys of a store may have lone surrogates."""
    return MaskRef(_escape_utf8(ref.name), _escape_utf8(ref.file), ref.row)


def _escape_utf8(text: str) -> str:
    # Different texts stay different, as backslashes are doubled.
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()
