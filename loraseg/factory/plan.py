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

from loraseg.errors import DatasetError, IntegrityError
from loraseg.factory.sources import MaskSource, Named
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import mask_at_size

__all__ = ["Entry", "Part", "Planned", "decode_plan", "encode_plan", "parts", "survey"]

T = TypeVar("T")

_READERS = 8
_MOST_PLAN_BYTES = 2 * 1024**3
_PLAN = pa.schema(
    [("part", pa.string()), ("mask_id", pa.string()), ("name", pa.string()), ("last", pa.int32())]
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A mask of the source after a first look.

    Attributes:
        mask: Where it is.
        mask_id: Digest of its ids; None if it cannot be read.
        reason: Why no image is made of it: what is wrong, or whose copy it is; else None.
    """

    mask: Named
    mask_id: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of work.

    Attributes:
        entries: Its masks.
        first: The first image k of each.
        last: The last one.
        older: Shards with images 0 to ``first`` - 1 of the same masks, which vote as well.
    """

    entries: tuple[Entry, ...]
    first: int
    last: int
    older: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """32 hex digits that stand for what the part is made of."""
        rows = [[one.mask_id, one.reason, one.mask.name] for one in self.entries]
        text = json.dumps([rows, self.first, self.last, self.older], separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(slots=True)
class Planned:
    """What earlier runs have made.

    Attributes:
        last: By mask id, the last image there is.
        shards: By mask id, the shards that hold its images, oldest first.
        names: Names of masks that no image could be made of.
    """

    last: dict[str, int] = field(default_factory=dict[str, int])
    shards: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    names: set[str] = field(default_factory=set[str])

    def add(self, part: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of the rows of one part of a plan."""
        for row in rows:
            if row["last"] < 0:
                self.names.add(row["name"])
                continue
            mask_id = row["mask_id"]
            self.last[mask_id] = max(row["last"], self.last.get(mask_id, -1))
            self.shards[mask_id] = (*self.shards.get(mask_id, ()), part)


def survey(
    source: MaskSource, masks: Sequence[Named], *, classes: int, size: tuple[int, int] | None
) -> list[Entry]:
    """Read all masks once and find out what each is; of equal ones the first by name counts.

    Args:
        source: Of the masks.
        masks: In order of their names.
        classes: Ids that may occur.
        size: Of the images; masks are compared as large as that. None for their own size.

    Raises:
        StoreError: The store cannot be read.
    """

    def look(mask: Named) -> Entry:
        try:
            ids = source.read(mask, classes=classes)
            return Entry(mask, mask_digest(mask_at_size(ids, size) if size else ids))
        except DatasetError as error:
            return Entry(mask, None, str(error))

    found: list[Entry] = []
    first: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS, thread_name_prefix="survey") as pool:
        # In pieces, so that no more than these wait in the pool.
        for some in _slices(masks, 1024):
            for entry in pool.map(look, some):
                twin = entry.mask_id and first.setdefault(entry.mask_id, entry.mask.name)
                if twin and twin != entry.mask.name:
                    entry = Entry(entry.mask, entry.mask_id, f"the same ids as {twin!r}")
                found.append(entry)
    return found


def parts(entries: Sequence[Entry], images: int, size: int, done: Planned) -> Iterator[Part]:
    """Cut what is missing into parts.

    Args:
        entries: From :func:`survey`.
        images: K.
        size: Masks of a part.
        done: What earlier runs have made.
    """
    fresh = [one for one in entries if _is_new(one, done)]
    fresh.sort(key=lambda one: (one.reason is not None, one.mask_id or "", one.mask.name))
    for some in _slices(fresh, size):
        yield Part(tuple(some), 0, images - 1)
    short = [
        one
        for one in entries
        if one.reason is None
        and one.mask_id
        and 0 <= done.last.get(one.mask_id, images) + 1 < images
    ]
    short.sort(key=lambda one: _history(one, done))
    # Masks that went through the same shards have them in common again.
    for (older, last), some in groupby(short, key=lambda one: _history(one, done)[:2]):
        for chunk in _slices(list(some), size):
            yield Part(tuple(chunk), last + 1, images - 1, older)


def encode_plan(work: Iterable[Part]) -> bytes:
    """Return a Parquet file that says which mask is in which part; equal parts, equal bytes."""
    rows = sorted(
        (part.id, one.mask_id or "", one.mask.name, -1 if one.reason else part.last)
        for part in work
        for one in part.entries
    )
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    table = pa.table(
        {
            field.name: pa.array([_plain(value) for value in column], field.type)
            for field, column in zip(_PLAN, columns, strict=True)
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_plan(data: bytes, where: str, done: Planned) -> None:
    """Add what a plan says to what is known to be done.

    Raises:
        IntegrityError: It is no plan.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        groups = range(file.metadata.num_row_groups)
        if sum(file.metadata.row_group(i).total_byte_size for i in groups) > _MOST_PLAN_BYTES:
            raise IntegrityError(f"{where}: unpacked, the plan is larger than 2 GiB")
        table = file.read()
        if not table.schema.equals(_PLAN):
            raise IntegrityError(f"{where}: columns {table.schema.names}, expected {_PLAN.names}")
        for part, rows in groupby(table.to_pylist(), key=lambda row: row["part"]):
            done.add(f"shards/{part}.parquet", rows)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{where}: not a plan: {error}") from error


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_new(entry: Entry, done: Planned) -> bool:
    if entry.reason is not None or entry.mask_id is None:
        return entry.mask.name not in done.names
    return entry.mask_id not in done.last


def _history(entry: Entry, done: Planned) -> tuple[tuple[str, ...], int, str]:
    known = entry.mask_id or ""
    return done.shards[known], done.last[known], known


def _plain(value: Any) -> Any:
    """Return text that UTF-8 can hold: keys of a store may have lone surrogates."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
