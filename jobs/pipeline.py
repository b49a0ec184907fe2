"""MatchMask++: train, generate pairs, segment unlabelled images, generate more pairs, train again.

ray job submit --working-dir . -- python -m jobs.pipeline method=matchmask_pp images=16 \
    real=s3://bucket/city unlabelled=s3://bucket/photos adapters="[s3://bucket/generators#city]" \
    output=s3://bucket/city-pp

Safe to kill at any point and to run again: completed stages are skipped, and stages whose data or
settings have changed run again. Between two stages, ``output`` may be moved.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.executor import ActorPoolConfig, RayExecutor
from actors.resources import connect_with_capacity
from actors.train_segmenter import WorkerGroupConfig, ray_train_runner
from loraseg import config as configuration
from loraseg.batch.matchmask_pp.data import data_digests
from loraseg.batch.matchmask_pp.pipeline import (
    PipelineConfig,
    StageLog,
    format_result,
    matchmask_pp,
)
from loraseg.batch.matchmask_pp.stages import PipelineStages
from loraseg.storage import absolute_uri, open_store
from loraseg.train.closed_set.job import SegmenterTrainingTask, TaskRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The pipeline, and what its stages take on Ray.

    Attributes:
        pipeline: Its fields are keys of this config.
        method: The only method so far.
        workers: Workers of the training stages.
        generators: Pool of the workers that generate images.
        voters: Pool of the workers that filter labels and segment unlabelled images.
    """

    pipeline: PipelineConfig = field(metadata=configuration.INLINED)
    method: Literal["matchmask_pp"] = "matchmask_pp"
    workers: WorkerGroupConfig = field(default_factory=WorkerGroupConfig)
    generators: ActorPoolConfig = field(default_factory=ActorPoolConfig)
    voters: ActorPoolConfig = field(default_factory=lambda: ActorPoolConfig(cpus=0.5))


def main(config: Config) -> int:
    """Run the stages that are not completed; print the results of all."""
    pipeline = replace(
        config.pipeline,
        real=absolute_uri(config.pipeline.real),
        unlabelled=absolute_uri(config.pipeline.unlabelled),
        output=absolute_uri(config.pipeline.output),
    )
    pairs = RayExecutor(config.generators, config.voters)
    stages = PipelineStages(pipeline, _training(config.workers), pairs, RayExecutor(config.voters))
    settings = configuration.to_dict(pipeline)
    for name in ("output", "rounds"):  # the output may be moved, and rounds added
        del settings[name]
    log = StageLog(open_store(pipeline.output))
    for name, result in matchmask_pp(pipeline, settings, data_digests(pipeline), stages, log):
        sys.stdout.write(f"{name}: {format_result(result)}\n")
    return 0


def _training(workers: WorkerGroupConfig) -> TaskRunner:
    def train(task: SegmenterTrainingTask) -> None:
        connect_with_capacity(workers.resources)
        ray_train_runner(workers)(task)

    return train


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
