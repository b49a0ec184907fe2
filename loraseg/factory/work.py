"""The second stage of a part of the work: vote on its images and write the shard."""

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
from loraseg.data.shard_reader import ShardDataset
from loraseg.data.shards import PairRow, decode_shard, encode_shard
from loraseg.errors import MALFORMED, IntegrityError, LorasegError
from loraseg.factory.draw import Draft, Drawn, Made
from loraseg.factory.equipment import load_judge
from loraseg.factory.judging import NEEDS, judge
from loraseg.factory.pinned import Pinned
from loraseg.factory.plan import Entry, Part
from loraseg.factory.tally import Tally
from loraseg.segment.closed_checkpoint import ClosedSetSegmenter
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.synth.vote import Filtered, Judged, apply_filter
from loraseg.tensor_types import ndarray

__all__ = [
    "DONE",
    "Done",
    "Outcome",
    "Vote",
    "done_file",
    "read_done",
]

logger = logging.getLogger(__name__)

# By mask id and k, the PNG of what the segmenter saw; None where there is no segmenter.
SeenBefore = dict[str, dict[int, bytes | None]]

DONE = "parts"


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

    @cached_property
    def _committed(self) -> tuple[ShardDataset, dict[str, ShardEntry]]:
        """What earlier runs committed, and its shards by file."""
        dataset = ShardDataset.open(self._output)
        return dataset, {entry.file: entry for entry in dataset.manifest.shards}

    def _rows(self, drawn: Drawn, part: Part, before: SeenBefore) -> list[PairRow]:
        entry, made = drawn.entry, drawn.result
        if isinstance(made, str):
            if part.first > 0:
                return []  # the run that made the first images told it
            twin = entry.reason is not None and entry.mask_id is not None
            return [_refused(entry, "duplicate" if twin else "bad_mask", made)]
        older = before.get(entry.mask_id or "", {})
        if sorted(older) != list(range(part.first)):
            raise IntegrityError(
                f"mask {entry.mask.name!r}: earlier shards hold images {sorted(older)}, expected 0 "
                f"to {part.first - 1}"
            )
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
        """Read what earlier runs saw in the images of the part's masks, as it was committed."""
        seen: SeenBefore = defaultdict(dict)
        if not part.older:
            return seen
        committed, entries = self._committed
        for file in part.older:
            if file not in entries:
                continue  # no image could be made of any of its masks
            columns = ("mask_id", "k", "predicted")
            for row in committed.shard(entries[file], columns=columns):
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
    except (*MALFORMED, LorasegError):
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
