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
from loraseg.factory.sources import MaskSource, Named, is_parquet
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import mask_at_size

__all__ = ["Entry", "Part", "Planned", "decode_plan", "encode_plan", "parts", "survey"]

T = TypeVar("T")

_READERS = 8
_MOST_PLAN_BYTES = 2 * 1024**3
_PLAN = pa.schema(
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
        rows = [[one.mask_id, one.reason, *_row(one.mask)] for one in self.entries]
        text = json.dumps([rows, self.first, self.last, self.older], separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(slots=True)
class Planned:
    """What earlier runs have made.

    Attributes:
        last: By mask id, the last image there is.
        shards: By mask id, the shards that hold its images, oldest first.
        owners: By mask id, the mask that its images were made of.
        refused: Masks of which no image was to be made. Both as a plan holds them.
    """

    last: dict[str, int] = field(default_factory=dict[str, int])
    shards: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    owners: dict[str, Named] = field(default_factory=dict[str, Named])
    refused: set[Named] = field(default_factory=set[Named])

    def add(self, part: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of the rows of one part of a plan."""
        for row in rows:
            mask = Named(row["name"], row["file"], row["row"])
            if row["last"] < 0:
                self.refused.add(mask)
                continue
            mask_id = row["mask_id"]
            self.owners.setdefault(mask_id, mask)
            self.last[mask_id] = max(row["last"], self.last.get(mask_id, -1))
            self.shards[mask_id] = (*self.shards.get(mask_id, ()), part)


def survey(
    source: MaskSource,
    masks: Sequence[Named],
    done: Planned,
    *,
    classes: int,
    size: tuple[int, int] | None,
) -> list[Entry]:
    """Read all masks once and find out what each is; of equal ones only one counts.

    That is the one of which earlier runs made images, and else the first.

    Args:
        source: Of the masks.
        masks: In the order of the source.
        done: What earlier runs have made.
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

    found: dict[Named, Entry] = {}
    with ThreadPoolExecutor(_READERS, thread_name_prefix="survey") as pool:
        for some in _by_file(masks):
            found.update(zip(some, pool.map(look, some), strict=True))
    return _without_twins([found[mask] for mask in masks], done)


def _by_file(masks: Sequence[Named]) -> Iterator[Sequence[Named]]:
    """Yield masks in pieces, so that no more than these wait for a reader at a time.

    Whatever the names, a file of many masks is done with before the next one is fetched.
    """
    ordered = sorted(masks, key=lambda mask: (mask.file, mask.row))
    for _, same in groupby(ordered, key=lambda mask: is_parquet(mask.file) and mask.file):
        yield from _slices(list(same), 1024)


def _without_twins(entries: Sequence[Entry], done: Planned) -> list[Entry]:
    """Refuse all but one of the masks with equal ids."""
    counts: dict[str, Named] = {}
    for one in entries:
        if one.mask_id is None:
            continue
        if done.owners.get(one.mask_id) == _as_planned(one.mask):
            counts[one.mask_id] = one.mask
        else:
            counts.setdefault(one.mask_id, one.mask)

    def told(one: Entry) -> Entry:
        if one.mask_id is None or (twin := counts[one.mask_id]) == one.mask:
            return one
        place = f" ({twin.file}, row {twin.row})" if twin.name == one.mask.name else ""
        return Entry(one.mask, one.mask_id, f"the same ids as {twin.name!r}{place}")

    return [told(one) for one in entries]


def parts(entries: Sequence[Entry], images: int, size: int, done: Planned) -> Iterator[Part]:
    """Cut what is missing into parts.

    Args:
        entries: From :func:`survey`.
        images: K.
        size: Masks of a part.
        done: What earlier runs have made.
    """
    fresh = [one for one in entries if _is_new(one, done)]
    fresh.sort(key=lambda one: (one.reason is not None, one.mask_id or "", one.mask))
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
        (part.id, one.mask_id or "", *_row(_as_planned(one.mask)), _last(one, part))
        for part in work
        for one in part.entries
    )
    plain = [dict(zip(_PLAN.names, row, strict=True)) for row in rows]
    table = pa.Table.from_pylist(plain, _PLAN)
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
        return _as_planned(entry.mask) not in done.refused
    return entry.mask_id not in done.last


def _history(entry: Entry, done: Planned) -> tuple[tuple[str, ...], int, str]:
    known = entry.mask_id or ""
    return done.shards[known], done.last[known], known


def _row(mask: Named) -> tuple[str, str, int]:
    return mask.name, mask.file, mask.row


def _last(entry: Entry, part: Part) -> int:
    return -1 if entry.reason else part.last


def _as_planned(mask: Named) -> Named:
    """Return a mask as Parquet can hold it: keys of a store may have lone surrogates."""
    return Named(_utf8(mask.name), _utf8(mask.file), mask.row)


def _utf8(text: str) -> str:
    # Different texts stay different, as backslashes are doubled.
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()
