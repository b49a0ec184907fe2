"""MatchMask++: train, make pairs, segment unlabelled images, make pairs of these masks, train.

ray job submit --working-dir . -- python -m jobs.pipeline method=matchmask_pp images=16 \
    real=s3://bucket/city unlabelled=s3://bucket/photos adapters="[s3://bucket/generators#city]" \
    output=s3://bucket/city-pp

A stage that is done is skipped; started again after any accident, the job goes on. What depends on
data that has changed is done anew. Between two stages, ``output`` may be moved.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.executor import ActorPoolConfig
from actors.matchmask_pp import RayStageRunner
from actors.train_segmenter import WorkerGroupConfig
from loraseg import config as configuration
from loraseg.batch.matchmask_pp.data import data_digests
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig, StageLog, matchmask_pp
from loraseg.storage import absolute_uri, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(PipelineConfig):
    """What is worked on, and what each job takes on Ray."""

    method: Literal["matchmask_pp"] = "matchmask_pp"
    workers: WorkerGroupConfig = field(default_factory=WorkerGroupConfig)
    generators: ActorPoolConfig = field(default_factory=ActorPoolConfig)
    voters: ActorPoolConfig = field(default_factory=lambda: ActorPoolConfig(cpus=0.5))


def main(config: Config) -> int:
    """Run the stages that are not done; print all."""
    plain = configuration.project(config, PipelineConfig)
    plain = replace(
        plain,
        real=absolute_uri(plain.real),
        unlabelled=absolute_uri(plain.unlabelled),
        output=absolute_uri(plain.output),
    )
    tools = RayStageRunner(plain, config.workers, config.generators, config.voters)
    settings = configuration.to_dict(plain)
    for name in ("output", "rounds"):  # it may be moved, and go on
        del settings[name]
    ledger = StageLog(open_store(plain.output))
    for name, result in matchmask_pp(plain, settings, data_digests(plain), tools, ledger):
        sys.stdout.write(f"{name}: {_format_result(result)}\n")
    return 0


def _format_result(result: dict[str, object]) -> str:
    scores = {
        name: f"mIoU {100 * value:.1f} %"
        for name in ("segmenter", "control")
        if isinstance(value := result.get(f"{name}_miou"), float)
    }
    counts = {key: str(result[key]) for key in ("pairs", "count") if key in result}
    return ", ".join(f"{key} {value}" for key, value in {**scores, **counts}.items())


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
