"""Train a segmenter on real and synthetic pairs and, as a control, one on the real pairs only.

ray job submit --working-dir . -- python -m jobs.train_segmenter --config segmenter.yaml images=16

Writes segmenter.safetensors, control.safetensors, results.json and report.html to the output. A run
after a kill continues from the last checkpoint; a run after the end does nothing.
"""

import sys
from dataclasses import dataclass, field

from actors.resources import check_capacity, connect
from actors.train_segmenter import WorkerGroupConfig, ray_train_runner
from loraseg import config as configuration
from loraseg.train.closed_set.job import SegmenterTrainingConfig, train_segmenters


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The training, and where it runs.

    Attributes:
        training: Its fields are keys of this config.
        workers: Number and resources of the Ray Train workers.
        local: Train in this process, without Ray.
    """

    training: SegmenterTrainingConfig = field(metadata=configuration.INLINED)
    workers: WorkerGroupConfig = field(default_factory=WorkerGroupConfig)
    local: bool = False


def main(config: Config) -> None:
    """Train both segmenters unless they are finished, and print the scores."""
    if config.local:
        results = train_segmenters(config.training)
    else:
        started_here = connect()
        check_capacity(config.workers.resources, may_grow=not started_here)
        results = train_segmenters(config.training, ray_train_runner(config.workers))
    for name, arm in results["arms"].items():
        score = "not scored" if arm["miou"] is None else f"mIoU {100 * arm['miou']:.1f} %"
        sys.stdout.write(f"{name}: {score} after {arm['step']} steps, {arm['file']}\n")


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
