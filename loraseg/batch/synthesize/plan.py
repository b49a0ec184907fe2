"""Planning: conditions are scanned and cut into units that do not depend on their order."""

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

from loraseg.batch.synthesize.conditions import ConditionRef, ConditionSource, ScannedCondition
from loraseg.data.parquet_limits import ParquetLimits, open_checked_parquet
from loraseg.errors import DatasetError, IntegrityError

__all__ = [
    "PlanHistory",
    "SynthesisWorkUnit",
    "decode_plan",
    "encode_plan",
    "plan_units",
    "scan_conditions",
]

T = TypeVar("T")

_READ_THREADS = 8
_LIMITS = ParquetLimits(group_rows=2**20, column_bytes=2**29)
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
class SynthesisWorkUnit:
    """The conditions of one shard, and which images to generate from each.

    Attributes:
        conditions: The conditions.
        first_image: Number of the first image of each, from 0.
        last_image: Number of the last one.
        earlier_shards: Shards with images 0 to ``first_image`` - 1 of the same conditions, which
            vote as well.
    """

    conditions: tuple[ScannedCondition, ...]
    first_image: int
    last_image: int
    earlier_shards: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The first 32 hex digits of a sha256 over all fields."""
        rows = [
            [scanned.condition_id, scanned.reason, *_ref_columns(scanned.ref)]
            for scanned in self.conditions
        ]
        text = json.dumps(
            [rows, self.first_image, self.last_image, self.earlier_shards], separators=(",", ":")
        )
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def __str__(self) -> str:
        """Return the first and the last name."""
        return f"conditions {self.conditions[0].ref.name!r} to {self.conditions[-1].ref.name!r}"

    @property
    def image_count(self) -> int:
        """Number of images to generate."""
        usable = sum(scanned.reason is None for scanned in self.conditions)
        return usable * (self.last_image - self.first_image + 1)


@dataclass(slots=True)
class PlanHistory:
    """What earlier runs have generated, as their plans record it.

    Attributes:
        last_image: Number of the last image by condition id.
        shards: Shards with images of a condition by its id, oldest first.
        first_owner: By condition id, the reference that its images were generated from.
        rejected: References without images.
    """

    last_image: dict[str, int] = field(default_factory=dict[str, int])
    shards: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    first_owner: dict[str, ConditionRef] = field(default_factory=dict[str, ConditionRef])
    rejected: set[ConditionRef] = field(default_factory=set[ConditionRef])

    def add(self, shard: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the plan rows of one unit."""
        for row in rows:
            ref = ConditionRef(row["name"], row["file"], row["row"])
            if row["last"] < 0:
                self.rejected.add(ref)
                continue
            condition_id = row["mask_id"]
            self.first_owner.setdefault(condition_id, ref)
            self.last_image[condition_id] = max(row["last"], self.last_image.get(condition_id, -1))
            self.shards[condition_id] = (*self.shards.get(condition_id, ()), shard)


def scan_conditions(
    source: ConditionSource, refs: Sequence[ConditionRef], history: PlanHistory
) -> list[ScannedCondition]:
    """Read every condition once and reject the invalid ones and all but one of equal content.

    Of equal ones that is kept which earlier runs used, else the first.

    Args:
        source: Source of the conditions.
        refs: In the order of the source.
        history: What earlier runs have generated.

    Raises:
        StoreError: The store cannot be read.
    """

    def scan(ref: ConditionRef) -> ScannedCondition:
        try:
            return ScannedCondition(ref, source.condition_id(ref))
        except DatasetError as error:
            return ScannedCondition(ref, None, str(error))

    scanned: dict[ConditionRef, ScannedCondition] = {}
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="scan") as pool:
        for batch in source.read_batches(refs):
            scanned.update(zip(batch, pool.map(scan, batch), strict=True))
    return _reject_duplicates([scanned[ref] for ref in refs], history)


def _reject_duplicates(
    scanned: Sequence[ScannedCondition], history: PlanHistory
) -> list[ScannedCondition]:
    kept: dict[str, ConditionRef] = {}
    for condition in scanned:
        if condition.condition_id is None:
            continue
        if history.first_owner.get(condition.condition_id) == _plan_ref(condition.ref):
            kept[condition.condition_id] = condition.ref
        else:
            kept.setdefault(condition.condition_id, condition.ref)

    def reject(condition: ScannedCondition) -> ScannedCondition:
        ref, condition_id = condition.ref, condition.condition_id
        if condition_id is None or (twin := kept[condition_id]) == ref:
            return condition
        position = f" ({twin.file}, row {twin.row})" if twin.name == ref.name else ""
        return ScannedCondition(ref, condition_id, f"the same ids as {twin.name!r}{position}")

    return [reject(condition) for condition in scanned]


def plan_units(
    scanned: Sequence[ScannedCondition], images: int, size: int, history: PlanHistory
) -> Iterator[SynthesisWorkUnit]:
    """Cut what is missing into units.

    Args:
        scanned: From :func:`scan_conditions`.
        images: Images per condition, K in the papers.
        size: Conditions per unit.
        history: What earlier runs have generated.
    """
    fresh = [condition for condition in scanned if _is_new(condition, history)]
    fresh.sort(key=lambda one: (one.reason is not None, one.condition_id or "", one.ref))
    for chunk in _chunks(fresh, size):
        yield SynthesisWorkUnit(tuple(chunk), 0, images - 1)
    incomplete = [
        condition
        for condition in scanned
        if condition.reason is None
        and condition.condition_id
        and 0 <= history.last_image.get(condition.condition_id, images) + 1 < images
    ]
    incomplete.sort(key=lambda condition: _earlier_images(condition, history))
    # A unit holds conditions with the same earlier shards, so that it reads these only.
    for (shards, last), group in groupby(
        incomplete, key=lambda condition: _earlier_images(condition, history)[:2]
    ):
        for chunk in _chunks(list(group), size):
            yield SynthesisWorkUnit(tuple(chunk), last + 1, images - 1, shards)


def encode_plan(units: Iterable[SynthesisWorkUnit]) -> bytes:
    """Return a Parquet file of the conditions of each unit; equal units give equal bytes."""
    rows = sorted(
        (
            unit.id,
            condition.condition_id or "",
            *_ref_columns(_plan_ref(condition.ref)),
            -1 if condition.reason else unit.last_image,
        )
        for unit in units
        for condition in unit.conditions
    )
    plain = [dict(zip(_PLAN_SCHEMA.names, row, strict=True)) for row in rows]
    table = pa.Table.from_pylist(plain, _PLAN_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_plan(data: bytes, where: str, history: PlanHistory) -> None:
    """Add the content of a plan to a history.

    Args:
        data: From :func:`encode_plan`.
        where: URI of the plan, for error messages.
        history: Is extended.

    Raises:
        IntegrityError: The data is not a plan.
    """
    file = open_checked_parquet(data, where, _LIMITS, schema=_PLAN_SCHEMA)
    rows = (
        row
        for group in range(len(file.group_rows))
        for batch in file.batches(group, _PLAN_SCHEMA.names)
        for row in batch.to_pylist()
    )
    try:
        for unit_id, unit_rows in groupby(rows, key=lambda row: row["part"]):
            history.add(f"shards/{unit_id}.parquet", unit_rows)
    except (UnicodeDecodeError, TypeError) as error:
        raise IntegrityError(f"{where}: not a plan: {error}") from error


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_new(scanned: ScannedCondition, history: PlanHistory) -> bool:
    if scanned.reason is not None or scanned.condition_id is None:
        return _plan_ref(scanned.ref) not in history.rejected
    return scanned.condition_id not in history.last_image


def _earlier_images(
    scanned: ScannedCondition, history: PlanHistory
) -> tuple[tuple[str, ...], int, str]:
    condition_id = scanned.condition_id or ""
    return history.shards[condition_id], history.last_image[condition_id], condition_id


def _ref_columns(ref: ConditionRef) -> tuple[str, str, int]:
    return ref.name, ref.file, ref.row


def _plan_ref(ref: ConditionRef) -> ConditionRef:
    """Return a reference as Parquet can hold it: keys of a store may have lone surrogates."""
    return ConditionRef(_escape_utf8(ref.name), _escape_utf8(ref.file), ref.row)


def _escape_utf8(text: str) -> str:
    # Different texts stay different, since backslashes are doubled.
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()
