"""Train a segmenter on real and synthetic pairs, and beside it one on the real ones alone.

ray job submit --working-dir . -- python -m jobs.train_segmenter --config segmenter.yaml images=16

Writes segmenter.safetensors, control.safetensors, results.json and report.html to the output. Run
again after a kill, it goes on from the last checkpoint; run again when done, it does nothing.
"""

import sys
from dataclasses import dataclass, field

from actors.resources import check_capacity, connect
from actors.train_segmenter import WorkerGroupConfig, ray_train_runner
from loraseg import config as configuration
from loraseg.train.closed_set.job import SegmenterTrainingConfig, train_segmenters


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(SegmenterTrainingConfig):
    """What a segmenter is trained on, and how to run it.

    Attributes:
        workers: How many train together on Ray Train, and what each takes.
        local: Train in this process, without Ray.
    """

    workers: WorkerGroupConfig = field(default_factory=WorkerGroupConfig)
    local: bool = False


def main(config: Config) -> None:
    """Train what is not trained yet, and print the scores."""
    plain = configuration.project(config, SegmenterTrainingConfig)
    if config.local:
        results = train_segmenters(plain)
    else:
        started_here = connect()
        check_capacity(config.workers.resources, may_grow=not started_here)
        results = train_segmenters(plain, ray_train_runner(config.workers))
    for name, arm in results["arms"].items():
        score = "not scored" if arm["miou"] is None else f"mIoU {100 * arm['miou']:.1f} %"
        sys.stdout.write(f"{name}: {score} after {arm['step']} steps, {arm['file']}\n")


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
