"""The jobs of MatchMask++ on Ray: training, pseudo-masks, synthesis."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

from actors.executor import ActorPoolConfig, RayExecutor
from actors.resources import ResourceConfig, check_capacity, connect
from actors.tasks import get_result, run_ray_tasks
from actors.train_segmenter import WorkerGroupConfig, ray_train_runner
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig, StageResult
from loraseg.batch.matchmask_pp.pseudo_masks import (
    PseudoMaskConfig,
    PseudoMaskWriter,
    list_images,
    work_units,
    write_summary,
)
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.run import synthesize
from loraseg.train.closed_set.job import SegmenterTrainingConfig, train_segmenters

__all__ = ["RayStageRunner"]


class RayStageRunner:
    """Every job writes below ``config.output``, in a folder named by its stage and inputs.

    Places in arguments and results are relative to ``config.output``.
    """

    def __init__(
        self,
        config: PipelineConfig,
        workers: WorkerGroupConfig,
        generators: ActorPoolConfig,
        voters: ActorPoolConfig,
    ) -> None:
        """Take what is worked on, and what each job takes."""
        self._config, self._workers = config, workers
        self._generators, self._voters = generators, voters

    def train(self, output: str, synthetic: Sequence[str], reuse: str | None) -> StageResult:
        """Train a segmenter, and its control unless it is to be reused."""
        config = self._config
        self._check_capacity(self._workers.resources)
        wanted = SegmenterTrainingConfig(
            real=config.real,
            images=config.images,
            synthetic=tuple(self._uri(one) for one in synthetic),
            recipe=config.recipe,
            overrides=config.overrides,
            output=self._uri(output),
            reuse=None if reuse is None else self._uri(reuse),
            seed=config.seed,
        )
        results = train_segmenters(wanted, ray_train_runner(self._workers))
        arms = results["arms"]
        return {
            "output": output,
            "segmenter": f"{output}/{arms['segmenter']['file']}",
            "digest": arms["segmenter"]["sha256"],
            "report": f"{output}/report.html",
            **{f"{name}_miou": arm["miou"] for name, arm in arms.items()},
        }

    def synthesize(self, output: str, masks: str | None, segmenter: str) -> StageResult:
        """Make pairs of the real masks, or of others."""
        config = self._config
        weighs = config.filter.method == "freemask"  # by losses on the images of the segmenter
        wanted = SynthesisConfig(
            masks=self._uri(masks) if masks else config.real,
            limit=None if masks else config.images,
            output=self._uri(output),
            base=config.base,
            adapters=config.adapters,
            segmenter=self._uri(segmenter),
            real=config.real if weighs else None,
            real_images=config.images if weighs else None,
            sampling=config.sampling,
            conditioning=config.conditioning,
            filter=config.filter,
        )
        manifest = synthesize(wanted, RayExecutor(self._generators, self._voters)).manifest
        return {
            "dataset": output,
            "digest": hashlib.sha256(manifest.to_bytes()).hexdigest(),
            "report": f"{output}/report.html",
            "pairs": manifest.pairs,
            "statuses": dict(manifest.statuses),
        }

    def pseudo_masks(self, output: str, segmenter: str) -> StageResult:
        """Segment the unlabelled images, a unit of work for every 64."""
        config = self._config
        self._check_capacity(self._voters)
        wanted = PseudoMaskConfig(
            images=config.unlabelled,
            output=self._uri(output),
            segmenter=self._uri(segmenter),
            threshold=config.threshold,
        )
        calls = [
            (f"pseudo-masks {number}", (wanted, keys))
            for number, keys in enumerate(work_units(list_images(config.unlabelled)))
        ]
        refused: dict[str, str] = {}
        for _, reference in run_ray_tasks(_write_pseudo_masks, calls, self._voters):
            refused |= get_result(reference, "making pseudo-masks")
        note = write_summary(wanted, refused)
        text = json.dumps(note, sort_keys=True).encode()
        return {
            "masks": output,
            "digest": hashlib.sha256(text).hexdigest(),
            "count": note["masks"],
            "refused": len(refused),
        }

    def _uri(self, path: str) -> str:
        return f"{self._config.output.rstrip('/')}/{path}"

    @staticmethod
    def _check_capacity(resources: ResourceConfig) -> None:
        check_capacity(resources, may_grow=not connect())


# Ray keeps its workers, and so the next unit in the same one finds the segmenter loaded.
_cached_pseudo_mask_writer = lru_cache(maxsize=1)(PseudoMaskWriter)


def _write_pseudo_masks(config: PseudoMaskConfig, keys: Sequence[str]) -> dict[str, str]:
    return _cached_pseudo_mask_writer(config)(keys)
