"""One part of the work in two stages: draw images of its masks; vote and write the shard."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loraseg import config as configuration
from loraseg.data.drawing import encode_png
from loraseg.data.masks import decode_mask, encode_mask
from loraseg.data.shard_manifest import ShardEntry
from loraseg.data.shards import PairRow, decode_shard, encode_shard, read_rows
from loraseg.errors import DatasetError, LorasegError
from loraseg.factory.equipment import load_generator, load_judge
from loraseg.factory.judging import NEEDS, judge
from loraseg.factory.pinned import Pinned
from loraseg.factory.plan import Entry, Part
from loraseg.factory.sources import MaskSource
from loraseg.factory.tally import Tally
from loraseg.segment.closed_checkpoint import ClosedSetSegmenter
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.synth.generator import Generated, Generator
from loraseg.synth.sizes import mask_at_size
from loraseg.synth.vote import Filtered, Judged, apply_filter
from loraseg.tensor_types import UInt8, ndarray

__all__ = [
    "DONE",
    "Done",
    "Draft",
    "Draw",
    "Drawn",
    "Made",
    "Outcome",
    "Vote",
    "done_file",
    "read_done",
]

logger = logging.getLogger(__name__)

# By mask id and k, the PNG of what the segmenter saw; None where there is no segmenter.
SeenBefore = dict[str, dict[int, bytes | None]]

DONE = "parts"


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """The images of a mask.

    Attributes:
        mask: At the size of the images.
        label: The mask, 255 also where a class had no room in the prompt.
        images: RGB, images ``first`` to ``last`` of the part.
        lineages: JSON of each image.
    """

    mask: UInt8[ndarray, "h w"]
    label: UInt8[ndarray, "h w"]
    images: UInt8[ndarray, "k h w 3"]
    lineages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A mask as planned, with its images or the reason why it has none."""

    entry: Entry
    result: Made | str


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A part with the images of its masks, or what ended it."""

    part: Part
    drawn: tuple[Drawn, ...] = ()
    error: LorasegError | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is written, and sums over its rows."""

    entry: ShardEntry
    tally: Tally


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part; after an error nothing of it is committed.

    Attributes:
        part: Its id.
        done: Its shard, and sums over its rows.
        error: What ended it.
    """

    part: str
    done: "Done | None" = None
    error: LorasegError | None = None


class Draw:
    """The first stage. Loads the generator for the first part; one thread at a time."""

    def __init__(self, pinned: Pinned) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._pinned = pinned
        config = pinned.config
        self._source = MaskSource(config.masks, config.classes, config.split)

    def __call__(self, part: Part) -> Draft:
        """Draw the images of each mask that can be drawn."""
        try:
            return Draft(part, tuple(self._drawn(entry, part) for entry in part.entries))
        except LorasegError as error:
            return Draft(part, error=error)

    @cached_property
    def _generator(self) -> Generator:
        return load_generator(self._pinned)

    def _drawn(self, entry: Entry, part: Part) -> Drawn:
        if entry.reason is not None:
            return Drawn(entry, entry.reason)
        size = self._pinned.config.sampling.size
        try:
            mask = self._source.read(entry.mask, classes=len(self._pinned.classes))
            mask = mask if size is None else mask_at_size(mask, size)
            # A mask at a time: its images are one batch, whatever else the part holds.
            made = list(self._generator.generate([(entry.mask.name, mask)], first=part.first))
        except DatasetError as error:
            return Drawn(entry, str(error))
        if any(one.lineage.mask_id != entry.mask_id for one in made):
            return Drawn(entry, f"mask {entry.mask.name!r} changed while images were made")
        images = np.stack([one.image for one in made])
        lineages = tuple(_lineage(one, part) for one in made)
        return Drawn(entry, Made(mask, made[0].label, images, lineages))


class Vote:
    """The second stage: filters, then writes the part's shard. One thread at a time."""

    def __init__(self, pinned: Pinned) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._pinned = pinned
        self._output = open_store(pinned.config.output)

    def __call__(self, draft: Draft) -> Outcome:
        """Write the shard, then the note that says it is there."""
        part = draft.part
        if draft.error is not None:
            return Outcome(part.id, error=draft.error)
        try:
            seen = self._seen_before(part)
            rows = [row for drawn in draft.drawn for row in self._rows(drawn, part, seen)]
            return _commit(self._output, part, rows, self._pinned.classes)
        except LorasegError as error:
            return Outcome(part.id, error=error)

    @cached_property
    def _segmenter(self) -> ClosedSetSegmenter | None:
        pinned = self._pinned
        return load_judge(pinned.config, pinned.label_space, digest=pinned.facts.segmenter)

    def _rows(self, drawn: Drawn, part: Part, before: SeenBefore) -> list[PairRow]:
        entry, made = drawn.entry, drawn.result
        if isinstance(made, str):
            twin = entry.reason is not None and entry.mask_id is not None
            return [_refused(entry, "duplicate" if twin else "bad_mask", made)]
        older = before.get(entry.mask_id or "", {})
        if len(older) != part.first:
            return []  # no image could be made of it before; that is told in the older shard
        judged = self._judged(made, older)
        filtered = self._filtered(made.label, judged)
        seen = None if judged is None else judged.labels
        name = _printable(entry.mask.name)
        return [
            self._row(name, made, index, len(older) + index, filtered, seen)
            for index in range(len(made.images))
        ]

    def _judged(self, made: Made, older: Mapping[int, bytes | None]) -> Judged | None:
        """Return what is seen in all images of a mask, those of earlier runs first."""
        if self._segmenter is None:
            return None
        needs = NEEDS[self._pinned.config.filter.method]
        judged = judge(self._segmenter, made.images, made.label, wanted=needs)
        known = [
            decode_mask(older[k] or b"", where=f"image {k} seen before") for k in sorted(older)
        ]
        return Judged(
            labels=np.concatenate([*(labels[None] for labels in known), judged.labels]),
            confidence=_after(judged.confidence, len(known)),
            loss=_after(judged.loss, len(known)),
        )

    def _filtered(self, label: ndarray, judged: Judged | None) -> Filtered | None:
        if judged is None:
            return None
        means = self._pinned.facts.class_loss
        return apply_filter(
            label,
            judged,
            self._pinned.config.filter,
            len(self._pinned.classes),
            class_loss=None if means is None else np.array(means, np.float64),
        )

    def _row(
        self,
        name: str,
        made: Made,
        index: int,
        place: int,
        filtered: Filtered | None,
        seen: ndarray | None,
    ) -> PairRow:
        """Return the row of image ``index`` of a mask, which is number ``place`` of the voters."""
        lineage = made.lineages[index]
        label, kept, by_class, dropped = made.label, 1.0, (), False
        if filtered is not None:
            label = filtered.labels[place]
            kept, dropped = float(filtered.kept[place]), bool(filtered.dropped[place])
            shares = filtered.kept_by_class[place]
            by_class = tuple(None if np.isnan(share) else float(share) for share in shares)
        least = self._pinned.config.filter.min_kept
        height, width = made.label.shape
        return PairRow(
            pair_id=lineage["pair_id"],
            status="dropped" if dropped else "ok",
            reason=f"kept {kept:.3f} of the labels, expected {least}" if dropped else None,
            mask_name=name,
            mask_id=lineage["mask_id"],
            k=lineage["k"],
            siblings=None if filtered is None else len(filtered.labels),
            image=encode_png(made.images[index], optimize=False),
            label=encode_mask(label),
            mask=encode_mask(made.mask),
            predicted=None if seen is None else encode_mask(seen[place]),
            height=height,
            width=width,
            seed=lineage["seed"],
            prompt=lineage["prompt"],
            generator=lineage["generator"],
            adapters=_used(lineage["adapters"]),
            heads=_used(lineage["heads"]),
            kept=kept,
            kept_by_class=by_class,
            lineage=json.dumps(self._told(lineage), sort_keys=True, ensure_ascii=False),
            code_revision=lineage["code_revision"],
        )

    def _told(self, lineage: dict[str, Any]) -> dict[str, Any]:
        rules = configuration.to_dict(self._pinned.config.filter)
        return {**lineage, "segmenter": self._pinned.facts.segmenter, "filter": rules}

    def _seen_before(self, part: Part) -> SeenBefore:
        """Read what earlier runs saw in the images of the part's masks."""
        seen: SeenBefore = defaultdict(dict)
        for file in part.older:
            data, where = self._output.get(file), f"{self._output.uri}/{file}"
            for row in read_rows(data, where, columns=("mask_id", "k", "predicted")):
                if row.mask_id is not None and row.k is not None:
                    seen[row.mask_id][row.k] = row.predicted
        return seen


def done_file(part: str) -> str:
    """Return the key of the note that says that a part's shard is written."""
    return f"{DONE}/{part}.json"


def read_done(output: ObjectStore, part: str, classes: int) -> Done | None:
    """Return what the note of a part says; None if there is none, or it is damaged."""
    try:
        values = json.loads(output.get(done_file(part)))
        return Done(ShardEntry(**values["shard"]), Tally.from_json(values["tally"], classes))
    except ObjectNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, LorasegError):
        logger.warning("%s: the note of part %s is damaged", output.uri, part)
        return None


def _commit(
    output: ObjectStore, part: Part, rows: Sequence[PairRow], classes: Sequence[str]
) -> Outcome:
    file = f"shards/{part.id}.parquet"
    data = encode_shard(rows, classes)
    if not output.put_if_absent(file, data):
        # This part's first attempt before its worker was lost, or a run beside this one. On a GPU
        # its bytes differ in their last bits: what is there counts.
        data = output.get(file)
        rows = decode_shard(data, f"{output.uri}/{file}")
    entry = ShardEntry(
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        rows=len(rows),
        statuses=dict(Counter(row.status for row in rows)),
    )
    done = Done(entry, Tally.of(rows, len(classes)))
    note = {"shard": entry.to_json(), "tally": done.tally.to_json()}
    output.put(done_file(part.id), json.dumps(note, sort_keys=True).encode())
    return Outcome(part.id, done)


def _lineage(made: Generated, part: Part) -> dict[str, Any]:
    return {**made.lineage.to_json(), "batch": [part.first, part.last]}


def _refused(entry: Entry, status: Any, reason: str | None) -> PairRow:
    nothing: dict[str, Any] = dict.fromkeys(
        [
            *("pair_id", "k", "siblings", "image", "label", "mask", "predicted", "height", "width"),
            *("seed", "prompt", "generator", "kept", "lineage", "code_revision"),
        ]
    )
    return PairRow(
        status=status,
        reason=_printable(reason or "no image could be made"),
        mask_name=_printable(entry.mask.name),
        mask_id=entry.mask_id,
        adapters=(),
        heads=(),
        kept_by_class=(),
        **nothing,
    )


def _used(used: Sequence[dict[str, Any]]) -> tuple[tuple[str, str, float], ...]:
    return tuple((one["name"], one["digest"], float(one["weight"])) for one in used)


def _after(values: ndarray | None, older: int) -> ndarray | None:
    """Return values of the new images behind zeros for the older ones, whose rows stay."""
    if values is None:
        return None
    return np.concatenate([np.zeros((older, *values.shape[1:]), values.dtype), values])


def _printable(text: str) -> str:
    """Return text as a shard can hold it: one line, printable, not too long."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean[:1000] or "?"
