"""MatchMask++: segmenter, pairs, better segmenter, pseudo-masks, more pairs, round again (b.6).

One file, ``pipeline.json``, says which stages are done and with what; a stage is skipped when it
was done with the same settings, the same data and the same results of the stages before. What a
stage leaves behind is safe to go on with after a kill, since each stage is a job of its own that
is. All places in the file are relative to the output, so that what is done stays done when the
output is moved; a stage that was under way may refuse to go on elsewhere.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from loraseg.errors import ConfigError, IntegrityError, StageError
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig

__all__ = [
    "STAGE_LOG_KEY",
    "PipelineConfig",
    "PipelineDataDigests",
    "StageLog",
    "StageRunner",
    "matchmask_pp",
]

logger = logging.getLogger(__name__)

STAGE_LOG_KEY = "pipeline.json"
_FORMAT = 1

StageResult = dict[str, Any]
RunStage = Callable[[str], StageResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """What MatchMask++ works on.

    Attributes:
        real: Dataset folder with labelled images in its splits ``train`` and ``val``.
        unlabelled: Store URI of images without labels, see
            :class:`~loraseg.batch.matchmask_pp.pseudo_masks.PseudoMaskConfig`.
        output: Store URI for everything that is made; may be moved.
        images: So many labelled images, the first by name; None for all.
        rounds: How often pseudo-masks are made of the unlabelled images.
        threshold: Pixels of an unlabelled image that the segmenter is less sure of say nothing.
        base: As for :class:`~loraseg.batch.synthesize.config.SynthesisConfig`.
        adapters: The same; the generator stays as it is in all rounds.
        sampling: The same.
        conditioning: The same.
        filter: The same.
        recipe: Of the segmenters, a key of
            :data:`~loraseg.train.closed_set.recipes.SEGMENTER_RECIPES`.
        overrides: Of the recipe.
        seed: Of the segmenters.
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
        """Check the ranges."""
        if self.rounds < 1:
            raise ConfigError(f"rounds: got {self.rounds}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineDataDigests:
    """Digests of the data, hex; :func:`~loraseg.batch.matchmask_pp.data.data_digests` makes them.

    Attributes:
        labelled: Of the images and masks that segmenters are trained and scored on.
        masks: Of the real masks that pairs are made of; some may have no image.
        unlabelled: Of the images that pseudo-masks are made of.
    """

    labelled: str
    masks: str
    unlabelled: str


@runtime_checkable
class StageRunner(Protocol):
    """The jobs that the pipeline is made of; each can be killed and called again.

    ``output`` names the output. A result is plain JSON values; ``digest`` in it says what was made.
    Places, in arguments and results alike, are below the output of the pipeline and relative to it.
    """

    def train(self, output: str, synthetic: Sequence[str], reuse: str | None) -> StageResult:
        """Train a segmenter on the real images and these datasets; ``segmenter`` is its file.

        ``reuse`` is the ``output`` of a training on the real images alone: the control.
        """
        ...

    def synthesize(self, output: str, masks: str | None, segmenter: str) -> StageResult:
        """Make pairs of these masks (None: the real ones); ``dataset`` is where they are."""
        ...

    def pseudo_masks(self, output: str, segmenter: str) -> StageResult:
        """Segment the unlabelled images; ``masks`` is where the masks are."""
        ...


class StageLog:
    """Which stages are done, in one file of the output."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def read(self) -> tuple[dict[str, Any], str | None]:
        """Return the stages by name, and the etag of the file.

        Raises:
            IntegrityError: The file is damaged.
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
            return content["stages"], etag
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{self._store.uri}/{STAGE_LOG_KEY}: damaged: {error}") from error

    def run_stage(self, name: str, inputs: Mapping[str, Any], run: RunStage) -> StageResult:
        """Return what a stage made of these inputs, from the ledger or by running it.

        ``run`` is given a name for its output that belongs to the stage and its inputs alone.

        Raises:
            StageError: Another pipeline wrote the ledger meanwhile.
            LorasegError: As raised by the stage.
        """
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        known = self.read()[0].get(name)
        if known is not None and known.get("inputs") == key:
            logger.info("%s: done before", name)
            return known["result"]
        logger.info("%s: begins", name)
        result = run(f"{name}-{key[:12]}")
        stages, etag = self.read()
        stages[name] = {"inputs": key, "result": result}
        content = {"format": _FORMAT, "stages": stages}
        data = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        if etag is None:
            won = self._store.put_if_absent(STAGE_LOG_KEY, data)
        else:
            won = self._store.put_if_match(STAGE_LOG_KEY, data, etag)
        if not won:
            raise StageError(
                f"{self._store.uri}/{STAGE_LOG_KEY}: another pipeline works on it; what {name} "
                f"made is "
                "kept, run again when the other one has ended"
            )
        return result


def matchmask_pp(
    config: PipelineConfig,
    settings: Mapping[str, Any],
    data: PipelineDataDigests,
    runner: StageRunner,
    stage_log: StageLog,
) -> list[tuple[str, StageResult]]:
    """Run all stages that are not done; return (name, result) of every stage in order.

    Args:
        config: How many rounds.
        settings: All of the config that decides what becomes of the data, as JSON values; a change
            of them does all stages anew.
        data: A change of it does anew the stages that it goes into, and what follows from them.
        runner: The jobs.
        stage_log: Of the output.

    Raises:
        LorasegError: As raised by a stage.
    """
    told: list[tuple[str, StageResult]] = []

    def stage(name: str, inputs: Mapping[str, Any], run: RunStage) -> StageResult:
        result = stage_log.run_stage(name, {**settings, **inputs}, run)
        told.append((name, result))
        return result

    first = teacher = stage(
        "segmenter-0", {"labelled": data.labelled}, lambda place: runner.train(place, (), None)
    )
    datasets: list[StageResult] = []
    for number in range(config.rounds + 1):
        masks = {"digest": data.masks, "masks": None}
        if number:
            masks = _pseudo_mask_stage(number, teacher, data, runner, stage)
        datasets.append(_synthesis_stage(number, masks, teacher, runner, stage))
        teacher = _training_stage(
            number + 1, data.labelled, datasets, first["output"], runner, stage
        )
    return told


StageFunction = Callable[[str, Mapping[str, Any], RunStage], StageResult]


def _pseudo_mask_stage(
    number: int,
    teacher: StageResult,
    data: PipelineDataDigests,
    runner: StageRunner,
    stage: StageFunction,
) -> StageResult:
    inputs = {"segmenter": teacher["digest"], "unlabelled": data.unlabelled}
    return stage(
        f"masks-{number}", inputs, lambda place: runner.pseudo_masks(place, teacher["segmenter"])
    )


def _synthesis_stage(
    number: int, masks: StageResult, teacher: StageResult, runner: StageRunner, stage: StageFunction
) -> StageResult:
    inputs = {"masks": masks["digest"], "segmenter": teacher["digest"]}
    return stage(
        f"pairs-{number}",
        inputs,
        lambda place: runner.synthesize(place, masks["masks"], teacher["segmenter"]),
    )


def _training_stage(
    number: int,
    labelled: str,
    datasets: Sequence[StageResult],
    reuse: str,
    runner: StageRunner,
    stage: StageFunction,
) -> StageResult:
    inputs = {"labelled": labelled, "pairs": [one["digest"] for one in datasets]}
    return stage(
        f"segmenter-{number}",
        inputs,
        lambda place: runner.train(place, [one["dataset"] for one in datasets], reuse),
    )
