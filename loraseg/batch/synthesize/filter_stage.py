"""The second stage of a unit: filter the labels of its images and write the shard."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from loraseg import config as configuration
from loraseg.batch.pseudo_labels import FILTER_INPUTS, predict_pseudo_labels
from loraseg.batch.synthesize.conditions import ScannedCondition
from loraseg.batch.synthesize.generate_stage import GeneratedMask, GeneratedUnit
from loraseg.batch.synthesize.models import load_pseudo_labeller
from loraseg.batch.synthesize.plan import SynthesisWorkUnit
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
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "UNITS_PREFIX",
    "CommittedShard",
    "FilterStage",
    "committed_key",
    "read_committed",
]

logger = logging.getLogger(__name__)

# By mask id and k, the PNG of the segmenter's prediction; None without a segmenter.
EarlierPredictions = dict[str, dict[int, bytes | None]]

UNITS_PREFIX = "parts"
_MAX_TEXT_CHARS = 1000


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """A shard that is written, and sums over its rows."""

    entry: ShardEntry
    statistics: ShardStatistics


class FilterStage:
    """Filters labels and writes shards. Loads the segmenter for the first unit; one thread."""

    def __init__(self, state: SynthesisRunState) -> None:
        """Open the output; the segmenter is loaded with the first unit."""
        self._state = state
        self._output = open_store(state.config.output)

    def __call__(self, generated: GeneratedUnit) -> CommittedShard:
        """Write the shard of a unit, then the note that says that it is complete.

        Raises:
            IntegrityError: A shard of an earlier run is damaged.
            LorasegError: As raised by stores and the segmenter.
        """
        unit = generated.unit
        earlier = self._earlier_predictions(unit)
        rows = [
            row
            for scanned, result in zip(unit.conditions, generated.results, strict=True)
            for row in self._rows(scanned, result, unit, earlier)
        ]
        return _write_shard(self._output, unit, rows, self._state.classes)

    @cached_property
    def _segmenter(self) -> ClosedSetSegmenter | None:
        state = self._state
        return load_pseudo_labeller(state.config, state.label_space, digest=state.models.segmenter)

    @cached_property
    def _committed_dataset(self) -> tuple[ShardDataset, dict[str, ShardEntry]]:
        """The dataset that earlier runs committed, and its shards by file."""
        dataset = ShardDataset.open(self._output)
        return dataset, {entry.file: entry for entry in dataset.manifest.shards}

    def _rows(
        self,
        scanned: ScannedCondition,
        result: GeneratedMask | str,
        unit: SynthesisWorkUnit,
        earlier_predictions: EarlierPredictions,
    ) -> list[PairRow]:
        if isinstance(result, str):
            if unit.first_image > 0:
                return []  # the run that generated the first images wrote the row
            duplicate = scanned.reason is not None and scanned.condition_id is not None
            return [_rejected_row(scanned, "duplicate" if duplicate else "bad_mask", result)]
        earlier = earlier_predictions.get(scanned.condition_id or "", {})
        if sorted(earlier) != list(range(unit.first_image)):
            raise IntegrityError(
                f"mask {scanned.ref.name!r}: earlier shards hold images {sorted(earlier)}, "
                f"expected 0 to {unit.first_image - 1}"
            )
        predicted = self._predict(result, earlier)
        filtered = self._filter(result.label, predicted)
        labels = None if predicted is None else predicted.labels
        name = _to_printable(scanned.ref.name)
        return [
            self._row(name, result, index, len(earlier) + index, filtered, labels)
            for index in range(len(result.images))
        ]

    def _predict(
        self, generated: GeneratedMask, earlier: Mapping[int, bytes | None]
    ) -> PseudoLabels | None:
        """Return the predictions for all images of a mask, those of earlier runs first."""
        if self._segmenter is None:
            return None
        outputs = FILTER_INPUTS[self._state.config.filter.method]
        predicted = predict_pseudo_labels(
            self._segmenter, generated.images, generated.label, outputs=outputs
        )
        known = [
            decode_mask(earlier[k] or b"", where=f"earlier prediction for image {k}")
            for k in sorted(earlier)
        ]
        return PseudoLabels(
            labels=np.concatenate([*(labels[None] for labels in known), predicted.labels]),
            confidence=_prepend_zeros(predicted.confidence, len(known)),
            loss=_prepend_zeros(predicted.loss, len(known)),
        )

    def _filter(
        self, label: UInt8[ndarray, "h w"], predicted: PseudoLabels | None
    ) -> FilteredLabels | None:
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
        generated: GeneratedMask,
        index: int,
        sibling: int,
        filtered: FilteredLabels | None,
        predicted: UInt8[ndarray, "k h w"] | None,
    ) -> PairRow:
        """Return the row of an image.

        Args:
            name: Name of the mask.
            generated: Images of the mask.
            index: Index of the image among them.
            sibling: Its index among the images that voted, earlier runs' included.
            filtered: Labels of the images that voted; None without a segmenter.
            predicted: Predictions for the images that voted; None without a segmenter.
        """
        lineage = generated.lineages[index]
        label, kept, by_class, dropped = generated.label, 1.0, (), False
        if filtered is not None:
            label = filtered.labels[sibling]
            kept, dropped = float(filtered.kept[sibling]), bool(filtered.dropped[sibling])
            shares = filtered.kept_by_class[sibling]
            by_class = tuple(None if np.isnan(share) else float(share) for share in shares)
        min_kept = self._state.config.filter.min_kept
        height, width = generated.label.shape
        return PairRow(
            pair_id=lineage["pair_id"],
            status="dropped" if dropped else "ok",
            reason=f"kept {kept:.3f} of the labels, expected {min_kept}" if dropped else None,
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
        settings = configuration.to_dict(self._state.config.filter)
        return {**lineage, "segmenter": self._state.models.segmenter, "filter": settings}

    def _earlier_predictions(self, unit: SynthesisWorkUnit) -> EarlierPredictions:
        """Read the committed predictions for earlier images of the unit's masks."""
        predictions: EarlierPredictions = defaultdict(dict)
        if not unit.earlier_shards:
            return predictions
        dataset, entries = self._committed_dataset
        for file in unit.earlier_shards:
            if file not in entries:
                continue  # none of its masks has an image
            columns = ("mask_id", "k", "predicted")
            for row in dataset.read_shard(entries[file], columns=columns):
                if row.mask_id is not None and row.k is not None:
                    predictions[row.mask_id][row.k] = row.predicted
        return predictions


def committed_key(unit_id: str) -> str:
    """Return the key of the note that says that a unit's shard is written."""
    return f"{UNITS_PREFIX}/{unit_id}.json"


def read_committed(output: ObjectStore, unit_id: str, classes: int) -> CommittedShard | None:
    """Read the note of a unit; None if there is none or it is damaged.

    Args:
        output: Store of the synthetic dataset.
        unit_id: Id of the unit.
        classes: Number of classes.

    Raises:
        StoreError: The store cannot be read.
    """
    try:
        values = json.loads(output.get(committed_key(unit_id)))
        return CommittedShard(
            ShardEntry(**values["shard"]), ShardStatistics.from_json(values["tally"], classes)
        )
    except ObjectNotFoundError:
        return None
    except (*MALFORMED_INPUT_ERRORS, LorasegError):
        logger.warning("%s: %s is damaged", output.uri, committed_key(unit_id))
        return None


def _write_shard(
    output: ObjectStore, unit: SynthesisWorkUnit, rows: Sequence[PairRow], classes: Sequence[str]
) -> CommittedShard:
    file = f"shards/{unit.id}.parquet"
    data = encode_shard(rows, classes)
    if not output.put_if_absent(file, data):
        # Written by another run, or by a worker that was lost. On a GPU its bytes may differ in the
        # last bits of the images: the shard that exists is kept.
        data = output.get(file)
        rows = decode_shard(data, f"{output.uri}/{file}")
    entry = ShardEntry(
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        rows=len(rows),
        statuses=dict(Counter(row.status for row in rows)),
    )
    shard = CommittedShard(entry, ShardStatistics.from_rows(rows, len(classes)))
    note = {"shard": entry.to_json(), "tally": shard.statistics.to_json()}
    output.put(committed_key(unit.id), json.dumps(note, sort_keys=True).encode())
    return shard


def _rejected_row(
    scanned: ScannedCondition, status: Literal["duplicate", "bad_mask"], reason: str
) -> PairRow:
    empty: dict[str, Any] = dict.fromkeys(
        [
            *("pair_id", "k", "siblings", "image", "label", "mask", "predicted", "height", "width"),
            *("seed", "prompt", "generator", "kept", "lineage", "code_revision"),
        ]
    )
    return PairRow(
        status=status,
        reason=_to_printable(reason or "no image could be made"),
        mask_name=_to_printable(scanned.ref.name),
        mask_id=scanned.condition_id,
        adapters=(),
        heads=(),
        kept_by_class=(),
        **empty,
    )


def _adapter_columns(used: Sequence[dict[str, Any]]) -> tuple[tuple[str, str, float], ...]:
    return tuple((adapter["name"], adapter["digest"], float(adapter["weight"])) for adapter in used)


def _prepend_zeros(
    values: Float[ndarray, "k h w"] | None, count: int
) -> Float[ndarray, "k_all h w"] | None:
    """Prepend zeros for the images of earlier runs, whose rows are not written again."""
    if values is None:
        return None
    return np.concatenate([np.zeros((count, *values.shape[1:]), values.dtype), values])


def _to_printable(text: str) -> str:
    """Return text as a shard can hold it: one line of printable characters, limited in length."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable[:_MAX_TEXT_CHARS] or "?"
