"""The stages of MatchMask++: training, pseudo-masks and synthesis."""

import hashlib
import json
from collections.abc import Sequence

from loraseg.batch.core.executor import Executor
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig, StageResult
from loraseg.batch.matchmask_pp.pseudo_masks import PseudoMaskConfig, write_pseudo_masks
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.run import synthesize
from loraseg.train.closed_set.job import SegmenterTrainingConfig, TaskRunner, train_segmenters

__all__ = ["PipelineStages"]


class PipelineStages:
    """Runs the stages. Each one writes below ``config.output``; paths are relative to it."""

    def __init__(
        self,
        config: PipelineConfig,
        run_training: TaskRunner,
        synthesis: Executor,
        segmentation: Executor,
    ) -> None:
        """Set what runs the work.

        Args:
            config: Data and models.
            run_training: Trains one segmenter.
            synthesis: Generates and filters pairs.
            segmentation: Segments unlabelled images.
        """
        self._config, self._run_training = config, run_training
        self._synthesis, self._segmentation = synthesis, segmentation

    def train(self, output: str, synthetic: Sequence[str], reuse: str | None) -> StageResult:
        """Train a segmenter, and its control unless ``reuse`` holds one.

        Raises:
            LorasegError: As raised by :func:`~loraseg.train.closed_set.job.train_segmenters`.
        """
        config = self._config
        training = SegmenterTrainingConfig(
            real=config.real,
            images=config.images,
            synthetic=tuple(self._uri(dataset) for dataset in synthetic),
            recipe=config.recipe,
            overrides=config.overrides,
            output=self._uri(output),
            reuse=None if reuse is None else self._uri(reuse),
            seed=config.seed,
        )
        arms = train_segmenters(training, self._run_training)["arms"]
        return {
            "output": output,
            "segmenter": f"{output}/{arms['segmenter']['file']}",
            "digest": arms["segmenter"]["sha256"],
            "report": f"{output}/report.html",
            **{f"{name}_miou": arm["miou"] for name, arm in arms.items()},
        }

    def synthesize(self, output: str, masks: str | None, segmenter: str) -> StageResult:
        """Generate pairs from masks; None for the real ones.

        Raises:
            LorasegError: As raised by :func:`~loraseg.batch.synthesize.run.synthesize`.
        """
        config = self._config
        # FreeMask compares with losses on the real images that the segmenter is trained on.
        needs_real = config.filter.method == "freemask"
        synthesis = SynthesisConfig(
            masks=self._uri(masks) if masks else config.real,
            limit=None if masks else config.images,
            output=self._uri(output),
            base=config.base,
            adapters=config.adapters,
            segmenter=self._uri(segmenter),
            real=config.real if needs_real else None,
            real_images=config.images if needs_real else None,
            sampling=config.sampling,
            conditioning=config.conditioning,
            filter=config.filter,
        )
        manifest = synthesize(synthesis, self._synthesis).manifest
        return {
            "dataset": output,
            "digest": hashlib.sha256(manifest.to_bytes()).hexdigest(),
            "report": f"{output}/report.html",
            "pairs": manifest.pairs,
            "statuses": dict(manifest.statuses),
        }

    def pseudo_masks(self, output: str, segmenter: str) -> StageResult:
        """Segment the unlabelled images.

        Raises:
            LorasegError: As raised by
                :func:`~loraseg.batch.matchmask_pp.pseudo_masks.write_pseudo_masks`.
        """
        config = PseudoMaskConfig(
            images=self._config.unlabelled,
            output=self._uri(output),
            segmenter=self._uri(segmenter),
            threshold=self._config.threshold,
        )
        summary = write_pseudo_masks(config, self._segmentation)
        return {
            "masks": output,
            "digest": hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest(),
            "count": summary["masks"],
            "refused": len(summary["refused"]),
        }

    def _uri(self, path: str) -> str:
        return f"{self._config.output.rstrip('/')}/{path}"
