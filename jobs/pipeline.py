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

from actors.pipeline import RayTools
from actors.pools import PoolPlacement
from actors.segmenter_training import Workers
from loraseg import config as configuration
from loraseg.factory.pipeline import Ledger, PipelineConfig, matchmask_pp
from loraseg.factory.pipeline_data import data_digests
from loraseg.storage import absolute, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(PipelineConfig):
    """What is worked on, and what each job takes on Ray."""

    method: Literal["matchmask_pp"] = "matchmask_pp"
    workers: Workers = field(default_factory=Workers)
    generators: PoolPlacement = field(default_factory=PoolPlacement)
    voters: PoolPlacement = field(default_factory=lambda: PoolPlacement(cpus=0.5))


def main(config: Config) -> int:
    """Run the stages that are not done; print all."""
    plain = configuration.narrowed(config, PipelineConfig)
    plain = replace(
        plain,
        real=absolute(plain.real),
        unlabelled=absolute(plain.unlabelled),
        output=absolute(plain.output),
    )
    tools = RayTools(plain, config.workers, config.generators, config.voters)
    settings = configuration.to_dict(plain)
    for name in ("output", "rounds"):  # it may be moved, and go on
        del settings[name]
    ledger = Ledger(open_store(plain.output))
    for name, result in matchmask_pp(plain, settings, data_digests(plain), tools, ledger):
        sys.stdout.write(f"{name}: {_told(result)}\n")
    return 0


def _told(result: dict[str, object]) -> str:
    scores = {
        name: f"mIoU {100 * value:.1f} %"
        for name in ("segmenter", "control")
        if isinstance(value := result.get(f"{name}_miou"), float)
    }
    counts = {key: str(result[key]) for key in ("pairs", "count") if key in result}
    return ", ".join(f"{key} {value}" for key, value in {**scores, **counts}.items())


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
