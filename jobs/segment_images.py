"""Segment all images below a URI: masks, explanations as Parquet, and a manifest at the end.

ray job submit --working-dir . -- python -m jobs.segment_images images=s3://bucket/photos \
    classes="[road, car]" library=s3://bucket/adapters output=s3://bucket/segmented

Safe to kill at any point and to run again: a run does what is missing. With local=true it needs no
Ray.

Exit status: 0 every image has its row (unusable ones without a mask), 1 some failed for a reason
that is not theirs and the next run repeats them, 2 a mistake in the config.
"""

import sys
from dataclasses import dataclass, field

from actors.executor import ActorPoolConfig, RayExecutor
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.segment_images import SegmentImagesConfig, segment_images


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The segmentation, and where it runs.

    Attributes:
        segmentation: Its fields are keys of this config.
        resources: What each worker takes on Ray; its ``cpus`` set the threads with ``local`` too.
        local: Segment in this process, without Ray.
    """

    segmentation: SegmentImagesConfig = field(metadata=configuration.INLINED)
    resources: ActorPoolConfig = field(default_factory=ActorPoolConfig)
    local: bool = False


def main(config: Config) -> int:
    """Run the job and return its exit status."""
    pool = config.resources
    executor = LocalExecutor(pool.threads) if config.local else RayExecutor(pool)
    summary = segment_images(config.segmentation, executor)
    statuses = ", ".join(f"{count} {status}" for status, count in summary.statuses.items())
    images = sum(summary.statuses.values())
    sys.stdout.write(
        f"{config.segmentation.output}: {images} images ({statuses}), "
        f"{summary.new_images} of them new\n"
    )
    return int(bool(summary.statuses.get("failed")))


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
