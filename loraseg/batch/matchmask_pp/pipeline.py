"""The order of the stages of MatchMask++, and the log of completed stages.

A first segmenter is trained on the real images; it filters pairs from the real masks, and both
train the next segmenter. Each round then segments the unlabelled images, generates pairs from these
pseudo-masks with the same generator, and trains a segmenter on all pairs. The paper runs one round.

``pipeline.json`` records the completed stages. A stage is skipped if it completed with the same
settings, data and results of earlier stages. Each stage can be killed and run again. All paths in
the file are relative to the output, so completed stages stay valid when the output is moved; a
stage that was killed may refuse to continue elsewhere.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from loraseg.batch.core.output import publish
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.json_io import readable_json
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig

__all__ = [
    "STAGE_LOG_KEY",
    "PipelineConfig",
    "PipelineDataDigests",
    "StageLog",
    "StageRunner",
    "format_result",
    "matchmask_pp",
]

logger = logging.getLogger(__name__)

STAGE_LOG_KEY = "pipeline.json"
_FORMAT = 1

StageResult = dict[str, Any]
RunStage = Callable[[str], StageResult]
StageFunction = Callable[[str, Mapping[str, Any], RunStage], StageResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Data and models of MatchMask++.

    Attributes:
        real: Dataset folder with labelled images in its splits ``train`` and ``val``.
        unlabelled: Store URI of images without labels, as for
            :class:`~loraseg.batch.matchmask_pp.pseudo_masks.PseudoMaskConfig`.
        output: Store URI for all results; may be moved.
        images: Number of labelled images, the first by name; None for all.
        rounds: Number of rounds of pseudo-masks, pairs and training.
        threshold: Smallest probability of a pseudo-label; pixels below it are 255.
        base: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        adapters: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        sampling: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        conditioning: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        filter: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        recipe: Recipe of the segmenters, a key of
            :data:`~loraseg.train.closed_set.recipes.SEGMENTER_RECIPES`.
        overrides: Fields of the recipe with other values.
        seed: Seed of the segmenters.
    """

    real: str
    unlabelled: str
    output: str
    images: int | None = None
    rounds: int = 1
    threshold: float = 0.9
    base: str = "miniature"
    adapters: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    recipe: str = "unet-miniature"
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: There are no rounds.
        """
        if self.rounds < 1:
            raise ConfigError(f"rounds: got {self.rounds}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineDataDigests:
    """Digests of the data, hex, from :func:`~loraseg.batch.matchmask_pp.data.data_digests`.

    Attributes:
        labelled: Images and masks that segmenters are trained and scored on.
        masks: Real masks that pairs are generated from; some may have no image.
        unlabelled: Images that pseudo-masks are made of.
    """

    labelled: str
    masks: str
    unlabelled: str


@runtime_checkable
class StageRunner(Protocol):
    """The stages of the pipeline; each can be killed and called again.

    ``output`` names the folder of a stage. A result holds plain JSON values; its ``digest``
    identifies what the stage wrote. Paths in arguments and results are relative to the output of
    the pipeline.
    """

    def train(self, output: str, synthetic: Sequence[str], reuse: str | None) -> StageResult:
        """Train a segmenter on the real images and these datasets; ``segmenter`` is its file.

        ``reuse`` is the output of a training on the real images alone, the control.
        """
        ...

    def synthesize(self, output: str, masks: str | None, segmenter: str) -> StageResult:
        """Generate pairs from masks (None for the real ones); ``dataset`` is their folder."""
        ...

    def pseudo_masks(self, output: str, segmenter: str) -> StageResult:
        """Segment the unlabelled images; ``masks`` is the folder of the masks."""
        ...


class StageLog:
    """The completed stages, in one object of the output."""

    def __init__(self, store: ObjectStore) -> None:
        """Set the store of the output; nothing is read."""
        self._store = store

    def read(self) -> tuple[dict[str, Any], str | None]:
        """Return the stages by name, and the etag of the object (None if there is none).

        Raises:
            IntegrityError: The object is damaged.
            StoreError: The store cannot be read.
        """
        try:
            data, etag = self._store.get_with_etag(STAGE_LOG_KEY)
        except ObjectNotFoundError:
            return {}, None
        try:
            content = json.loads(data)
            if content["format"] != _FORMAT or not isinstance(content["stages"], dict):
                raise ValueError(f"format {content['format']!r}")
            return cast(dict[str, Any], content["stages"]), etag
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{self._store.uri}/{STAGE_LOG_KEY}: damaged: {error}") from error

    def run_stage(self, name: str, inputs: Mapping[str, Any], run: RunStage) -> StageResult:
        """Return the result of a stage, from the log or by running it.

        Args:
            name: Name of the stage.
            inputs: All that its result depends on, as plain JSON values.
            run: Runs the stage; its argument is a folder name unique to stage and inputs.

        Raises:
            StageError: Another pipeline changed the log during the stage.
            LorasegError: As raised by the stage.
        """
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        known = self.read()[0].get(name)
        if known is not None and known.get("inputs") == key:
            logger.info("%s: completed by an earlier run", name)
            return known["result"]
        logger.info("%s: starts", name)
        result = run(f"{name}-{key[:12]}")
        stages, etag = self.read()
        stages[name] = {"inputs": key, "result": result}
        conflict = (
            f"{self._store.uri}/{STAGE_LOG_KEY}: another pipeline writes to it; the result of "
            f"{name} is kept, run again when the other pipeline has ended"
        )
        data = readable_json({"format": _FORMAT, "stages": stages})
        publish(self._store, STAGE_LOG_KEY, data, etag, conflict=conflict)
        return result


def matchmask_pp(
    config: PipelineConfig,
    settings: Mapping[str, Any],
    data: PipelineDataDigests,
    runner: StageRunner,
    stage_log: StageLog,
) -> list[tuple[str, StageResult]]:
    """Run all stages that are not completed; return (name, result) of every stage in order.

    Args:
        config: Sets the number of rounds.
        settings: All settings that results depend on, as plain JSON values; if one changes, all
            stages run again.
        data: Digests of the data; if one changes, the stages that depend on it run again.
        runner: Runs the stages.
        stage_log: Log of the output.

    Raises:
        LorasegError: As raised by a stage.
    """
    results: list[tuple[str, StageResult]] = []

    def stage(name: str, inputs: Mapping[str, Any], run: RunStage) -> StageResult:
        result = stage_log.run_stage(name, {**settings, **inputs}, run)
        results.append((name, result))
        return result

    first = segmenter = stage(
        "segmenter-0", {"labelled": data.labelled}, lambda output: runner.train(output, (), None)
    )
    datasets: list[StageResult] = []
    for number in range(config.rounds + 1):
        masks = {"digest": data.masks, "masks": None}
        if number:
            masks = _pseudo_mask_stage(number, segmenter, data, runner, stage)
        datasets.append(_synthesis_stage(number, masks, segmenter, runner, stage))
        segmenter = _training_stage(
            number + 1, data.labelled, datasets, first["output"], runner, stage
        )
    return results


def format_result(result: StageResult) -> str:
    """Return the scores and counts of a stage's result on one line."""
    scores = {
        name: f"mIoU {100 * value:.1f} %"
        for name in ("segmenter", "control")
        if isinstance(value := result.get(f"{name}_miou"), float)
    }
    counts = {key: str(result[key]) for key in ("pairs", "count") if key in result}
    return ", ".join(f"{key} {value}" for key, value in {**scores, **counts}.items())


def _pseudo_mask_stage(
    number: int,
    segmenter: StageResult,
    data: PipelineDataDigests,
    runner: StageRunner,
    stage: StageFunction,
) -> StageResult:
    inputs = {"segmenter": segmenter["digest"], "unlabelled": data.unlabelled}
    return stage(
        f"masks-{number}",
        inputs,
        lambda output: runner.pseudo_masks(output, segmenter["segmenter"]),
    )


def _synthesis_stage(
    number: int,
    masks: StageResult,
    segmenter: StageResult,
    runner: StageRunner,
    stage: StageFunction,
) -> StageResult:
    inputs = {"masks": masks["digest"], "segmenter": segmenter["digest"]}
    return stage(
        f"pairs-{number}",
        inputs,
        lambda output: runner.synthesize(output, masks["masks"], segmenter["segmenter"]),
    )


def _training_stage(
    number: int,
    labelled: str,
    datasets: Sequence[StageResult],
    reuse: str,
    runner: StageRunner,
    stage: StageFunction,
) -> StageResult:
    inputs = {"labelled": labelled, "pairs": [dataset["digest"] for dataset in datasets]}
    return stage(
        f"segmenter-{number}",
        inputs,
        lambda output: runner.train(output, [one["dataset"] for one in datasets], reuse),
    )
