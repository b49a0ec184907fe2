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
from loraseg.batch.pseudo_labels import FILTER_INPUTS, predict_pseudo_labels
from loraseg.batch.synthesize.generate_stage import GeneratedImages, GeneratedMask, GeneratedUnit
from loraseg.batch.synthesize.models import load_pseudo_labeller
from loraseg.batch.synthesize.plan import MaskWorkUnit, ScannedMask
from loraseg.batch.synthesize.shard_statistics import ShardStatistics
from loraseg.batch.synthesize.state import SynthesisRunState
from loraseg.data.drawing import encode_png
from loraseg.data.masks import decode_mask, encode_mask
from loraseg.data.shards.manifest import ShardEntry
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow, decode_shard, encode_shard
from loraseg.errors import MALFORMED_INPUT_ERRORS, IntegrityError, LorasegError
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.synth.vote import FilteredLabels, PseudoLabels, apply_filter
from loraseg.tensor_types import ndarray

__all__ = [
    "UNITS_PREFIX",
    "CommittedShard",
    "FilterStage",
    "MaskUnitResult",
    "committed_key",
    "read_committed",
]

logger = logging.getLogger(__name__)

# By mask id and k, the PNG of what the segmenter saw; None where there is no segmenter.
EarlierPredictions = dict[str, dict[int, bytes | None]]

UNITS_PREFIX = "parts"


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """A shard that is written, and sums over its rows."""

    entry: ShardEntry
    statistics: ShardStatistics


@dataclass(frozen=True, slots=True)
class MaskUnitResult:
    """What became of a part; after an error nothing of it is committed.

    Attributes:
        unit_id: Its id.
        shard: Its shard, and sums over its rows.
        error: What ended it.
    """

    unit_id: str
    shard: "CommittedShard | None" = None
    error: LorasegError | None = None


class FilterStage:
    """The second stage: filters, then writes the part's shard. One thread at a time."""

    def __init__(self, state: SynthesisRunState) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._state = state
        self._output = open_store(state.config.output)

    def __call__(self, draft: GeneratedUnit) -> MaskUnitResult:
        """Write the shard, then the note that says it is there."""
        part = draft.unit
        if draft.error is not None:
            return MaskUnitResult(part.id, error=draft.error)
        try:
            seen = self._earlier_predictions(part)
            rows = [row for drawn in draft.masks for row in self._rows(drawn, part, seen)]
            return _write_shard(self._output, part, rows, self._state.classes)
        except LorasegError as error:
            return MaskUnitResult(part.id, error=error)

    @cached_property
    def _segmenter(self) -> ClosedSetSegmenter | None:
        pinned = self._state
        return load_pseudo_labeller(
            pinned.config, pinned.label_space, digest=pinned.models.segmenter
        )

    @cached_property
    def _committed_dataset(self) -> tuple[ShardDataset, dict[str, ShardEntry]]:
        """What earlier runs committed, and its shards by file."""
        dataset = ShardDataset.open(self._output)
        return dataset, {entry.file: entry for entry in dataset.manifest.shards}

    def _rows(
        self, generated: GeneratedMask, unit: MaskWorkUnit, earlier: EarlierPredictions
    ) -> list[PairRow]:
        entry, made = generated.scanned, generated.result
        if isinstance(made, str):
            if unit.first_image > 0:
                return []  # the run that made the first images told it
            twin = entry.reason is not None and entry.mask_id is not None
            return [_rejected_row(entry, "duplicate" if twin else "bad_mask", made)]
        older = earlier.get(entry.mask_id or "", {})
        if sorted(older) != list(range(unit.first_image)):
            raise IntegrityError(
                f"mask {entry.ref.name!r}: earlier shards hold images {sorted(older)}, expected 0 "
                f"to {unit.first_image - 1}"
            )
        judged = self._predict(made, older)
        filtered = self._filter(made.label, judged)
        seen = None if judged is None else judged.labels
        name = _to_printable(entry.ref.name)
        return [
            self._row(name, made, index, len(older) + index, filtered, seen)
            for index in range(len(made.images))
        ]

    def _predict(
        self, generated: GeneratedImages, earlier: Mapping[int, bytes | None]
    ) -> PseudoLabels | None:
        """Return what is seen in all images of a mask, those of earlier runs first."""
        if self._segmenter is None:
            return None
        needs = FILTER_INPUTS[self._state.config.filter.method]
        judged = predict_pseudo_labels(
            self._segmenter, generated.images, generated.label, outputs=needs
        )
        known = [
            decode_mask(earlier[k] or b"", where=f"image {k} seen before") for k in sorted(earlier)
        ]
        return PseudoLabels(
            labels=np.concatenate([*(labels[None] for labels in known), judged.labels]),
            confidence=_prepend_zeros(judged.confidence, len(known)),
            loss=_prepend_zeros(judged.loss, len(known)),
        )

    def _filter(self, label: ndarray, predicted: PseudoLabels | None) -> FilteredLabels | None:
        if predicted is None:
            return None
        means = self._state.models.class_loss
        return apply_filter(
            label,
            predicted,
            self._state.config.filter,
            len(self._state.classes),
            class_loss=None if means is None else np.array(means, np.float64),
        )

    def _row(
        self,
        name: str,
        generated: GeneratedImages,
        index: int,
        sibling: int,
        filtered: FilteredLabels | None,
        predicted: ndarray | None,
    ) -> PairRow:
        """Return the row of image ``index`` of a mask, number ``sibling`` among the voters."""
        lineage = generated.lineages[index]
        label, kept, by_class, dropped = generated.label, 1.0, (), False
        if filtered is not None:
            label = filtered.labels[sibling]
            kept, dropped = float(filtered.kept[sibling]), bool(filtered.dropped[sibling])
            shares = filtered.kept_by_class[sibling]
            by_class = tuple(None if np.isnan(share) else float(share) for share in shares)
        least = self._state.config.filter.min_kept
        height, width = generated.label.shape
        return PairRow(
            pair_id=lineage["pair_id"],
            status="dropped" if dropped else "ok",
            reason=f"kept {kept:.3f} of the labels, expected {least}" if dropped else None,
            mask_name=name,
            mask_id=lineage["mask_id"],
            k=lineage["k"],
            siblings=None if filtered is None else len(filtered.labels),
            image=encode_png(generated.images[index], optimize=False),
            label=encode_mask(label),
            mask=encode_mask(generated.mask),
            predicted=None if predicted is None else encode_mask(predicted[sibling]),
            height=height,
            width=width,
            seed=lineage["seed"],
            prompt=lineage["prompt"],
            generator=lineage["generator"],
            adapters=_adapter_columns(lineage["adapters"]),
            heads=_adapter_columns(lineage["heads"]),
            kept=kept,
            kept_by_class=by_class,
            lineage=json.dumps(self._lineage_record(lineage), sort_keys=True, ensure_ascii=False),
            code_revision=lineage["code_revision"],
        )

    def _lineage_record(self, lineage: dict[str, Any]) -> dict[str, Any]:
        rules = configuration.to_dict(self._state.config.filter)
        return {**lineage, "segmenter": self._state.models.segmenter, "filter": rules}

    def _earlier_predictions(self, unit: MaskWorkUnit) -> EarlierPredictions:
        """Read what earlier runs saw in the images of the part's masks, as it was committed."""
        seen: EarlierPredictions = defaultdict(dict)
        if not unit.earlier_shards:
            return seen
        committed, entries = self._committed_dataset
        for file in unit.earlier_shards:
            if file not in entries:
                continue  # no image could be made of any of its masks
            columns = ("mask_id", "k", "predicted")
            for row in committed.read_shard(entries[file], columns=columns):
                if row.mask_id is not None and row.k is not None:
                    seen[row.mask_id][row.k] = row.predicted
        return seen


def committed_key(unit_id: str) -> str:
    """Return the key of the note that says that a part's shard is written."""
    return f"{UNITS_PREFIX}/{unit_id}.json"


def read_committed(output: ObjectStore, unit_id: str, classes: int) -> CommittedShard | None:
    """Return what the note of a part says; None if there is none, or it is damaged."""
    try:
        values = json.loads(output.get(committed_key(unit_id)))
        return CommittedShard(
            ShardEntry(**values["shard"]), ShardStatistics.from_json(values["tally"], classes)
        )
    except ObjectNotFoundError:
        return None
    except (*MALFORMED_INPUT_ERRORS, LorasegError):
        logger.warning("%s: the note of part %s is damaged", output.uri, unit_id)
        return None


def _write_shard(
    output: ObjectStore, unit: MaskWorkUnit, rows: Sequence[PairRow], classes: Sequence[str]
) -> MaskUnitResult:
    file = f"shards/{unit.id}.parquet"
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
    done = CommittedShard(entry, ShardStatistics.from_rows(rows, len(classes)))
    note = {"shard": entry.to_json(), "tally": done.statistics.to_json()}
    output.put(committed_key(unit.id), json.dumps(note, sort_keys=True).encode())
    return MaskUnitResult(unit.id, done)


def _rejected_row(scanned: ScannedMask, status: Any, reason: str | None) -> PairRow:
    nothing: dict[str, Any] = dict.fromkeys(
        [
            *("pair_id", "k", "siblings", "image", "label", "mask", "predicted", "height", "width"),
            *("seed", "prompt", "generator", "kept", "lineage", "code_revision"),
        ]
    )
    return PairRow(
        status=status,
        reason=_to_printable(reason or "no image could be made"),
        mask_name=_to_printable(scanned.ref.name),
        mask_id=scanned.mask_id,
        adapters=(),
        heads=(),
        kept_by_class=(),
        **nothing,
    )


def _adapter_columns(used: Sequence[dict[str, Any]]) -> tuple[tuple[str, str, float], ...]:
    return tuple((one["name"], one["digest"], float(one["weight"])) for one in used)


def _prepend_zeros(values: ndarray | None, count: int) -> ndarray | None:
    """Return values of the new images behind zeros for the older ones, whose rows stay."""
    if values is None:
        return None
    return np.concatenate([np.zeros((count, *values.shape[1:]), values.dtype), values])


def _to_printable(text: str) -> str:
    """Return text as a shard can hold it: one line, printable, not too long."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean[:1000] or "?"
