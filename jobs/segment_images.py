"""Segment all images below a URI: masks, explanations as Parquet, and a manifest at the end.

ray job submit --working-dir . -- python -m jobs.segment_images images=s3://bucket/photos \
    classes="[road, car]" library=s3://bucket/adapters output=s3://bucket/segmented

Started again after any accident it does what is missing; with nothing missing it does nothing.

Exit status: 0 every image has its row (bad ones without a mask), 1 some failed for a reason that is
not theirs and are tried again by the next run, 2 a mistake in the config.
"""

import sys
from dataclasses import dataclass, field

from actors.actor_pools import ActorPoolConfig
from actors.segment_images import RaySegmentationExecutor
from loraseg import config as configuration
from loraseg.batch.segment_images import SegmentImagesConfig, segment_images


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(SegmentImagesConfig):
    """What is segmented, and what each worker takes on Ray."""

    resources: ActorPoolConfig = field(default_factory=ActorPoolConfig)


def main(config: Config) -> int:
    """Run the job; return its exit status."""
    summary = segment_images(config, RaySegmentationExecutor(config.resources))
    statuses = ", ".join(f"{count} {status}" for status, count in summary.statuses.items())
    images = sum(summary.statuses.values())
    sys.stdout.write(
        f"{config.output}: {images} images ({statuses}), {summary.new_images} of them new\n"
    )
    return int(bool(summary.statuses.get("failed")))


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
