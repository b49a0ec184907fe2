"""Segment all images below a store URI: masks, explanations as Parquet, a manifest.

The images are processed in units of a fixed number of images, and each unit ends with one
explanation file: its presence says that its images are done. A file removes whole units from the
sorted listing, so a run that follows a kill cuts the rest at the same places, and the final bytes
equal those of a run without faults.
"""

__all__ = ["SegmentImagesConfig", "SegmentImagesSummary", "segment_images"]

from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.run import SegmentImagesSummary, segment_images
