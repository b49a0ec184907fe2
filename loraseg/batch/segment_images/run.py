"""Segment the images that no earlier run into the same output has segmented."""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from loraseg.batch.core.executor import Executor, Stage
from loraseg.batch.core.run import Progress, run_units
from loraseg.batch.segment_images.completed import (
    CompletedIndex,
    invalidate,
    read_completed,
)
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.manifest import (
    MANIFEST,
    count_statuses,
    encode_manifest,
    write_manifest,
)
from loraseg.batch.segment_images.plan import ImageWorkUnit, plan_units, stale_files
from loraseg.batch.segment_images.stage import SegmentImagesStage, resolve_models
from loraseg.batch.segment_images.state import open_run_state
from loraseg.storage import ObjectStore, open_store

__all__ = ["STAGES", "SegmentImagesSummary", "segment_images"]

logger = logging.getLogger(__name__)

STAGES = (Stage("segment", SegmentImagesStage),)


@dataclass(frozen=True, slots=True)
class SegmentImagesSummary:
    """Counts of a completed run.

    Attributes:
        new_images: Images that this run segmented.
        statuses: All images of the output by status, those of earlier runs included.
        generation: Generation of the library; None without one.
    """

    new_images: int
    statuses: dict[str, int]
    generation: int | None


def segment_images(config: SegmentImagesConfig, executor: Executor) -> SegmentImagesSummary:
    """Segment the images that no earlier run has segmented, then write the manifest.

    Safe to kill at any point and to run again. Images are read and masks written unit by unit, so
    memory grows by 40 bytes per image only.

    Args:
        config: Images, models and output.
        executor: Runs the work units.

    Raises:
        ConfigError: The output was created with other settings, or a setting is wrong.
        StageError: Workers were lost too often, or another run finished at the same time.
        LorasegError: As raised by stores, library and models; completed units stay committed.
    """
    config = config.resolved()
    state = open_run_state(config, executor, resolve_models)
    if state.models.vacancy and config.mode != "base":
        logger.warning("all images are segmented by the base alone: %s", state.models.vacancy)
    images, output = open_store(config.images), open_store(config.output)
    completed = _invalidate_stale(images, output, read_completed(output))
    if len(completed.ids):
        logger.info("%d images were segmented by earlier runs", len(completed.ids))
    units = plan_units(images.list_objects(), completed, config.images_per_file)
    files, new = dict(completed.files), 0
    progress, without_mask = Progress(), 0
    with closing(run_units(executor, STAGES, state, _delete_manifest(output, units))) as results:
        for file, summary in results:
            files[file] = summary
            images_in_file = sum(summary.statuses.values())
            new += images_in_file
            without_mask += images_in_file - summary.statuses.get("ok", 0)
            progress.update(images_in_file, f"{without_mask} without a mask")
    write_manifest(output, encode_manifest(state, files))
    return SegmentImagesSummary(new, count_statuses(files), state.config.generation)


def _invalidate_stale(
    images: ObjectStore, output: ObjectStore, completed: CompletedIndex
) -> CompletedIndex:
    """Invalidate the explanation files of replaced or failed images; return what is left."""
    stale = stale_files(images, completed)
    if not stale:
        return completed
    output.delete(MANIFEST)
    logger.info("%d files hold replaced or failed images and are made again", len(stale))
    for file in sorted(stale):
        invalidate(output, file)
    return read_completed(output)


def _delete_manifest(
    output: ObjectStore, units: Iterator[ImageWorkUnit]
) -> Iterator[ImageWorkUnit]:
    """Yield the units; before the first one, delete the manifest, which says that all is done."""
    for index, unit in enumerate(units):
        if index == 0:
            output.delete(MANIFEST)
        yield unit
