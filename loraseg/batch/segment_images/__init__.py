"""Segment all images below a store URI: masks, explanations as Parquet, a manifest.

Why files of a fixed number of images: a file that is there says that its images are done, and
because whole files leave the sorted listing at once, what is left after a kill is cut at the same
places again. Whatever is killed when, the bytes in the end are those of a run without accidents.
"""

__all__ = ["SegmentImagesConfig", "SegmentImagesSummary", "segment_images"]

from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.run import SegmentImagesSummary, segment_images
