"""CAT-Seg (CVPR 2024), plain and exact.

How ambiguous wordings of the method are read:

* Text guidance is normalise(mean over prompts of the features as given). With more than
  ``pad_len`` classes the prompts are normalised first. Class attention gets the projected
  guidance as it is.
* The best ``pad_len`` classes are chosen image by image by the largest cosine over prompts and
  places; with exactly ``pad_len`` classes there is neither choice nor padding.
* Padding tokens pass through the first norm of class attention like any class; the padding
  guidance does not pass through the text projection.
* L in linear attention counts the padding rows.
* "The identity enters twice" is literal: x + upsampled(pooled x + attention + MLP).
* Guidance is concatenated behind the tokens, and behind the upsampled maps in the decoder.
* ``attn_mask`` regions are the nine of the rolled map, as in Swin.
* A guidance block that happens to be the last one gives the changed block's output.
* Group norm of a stage narrower than 16 channels has one group.
"""

__all__ = [
    "CATSeg",
    "CATSegConfig",
    "catseg_from_clip",
    "freeze_clip",
    "load_catseg",
    "load_official_checkpoint",
    "official_state_dict",
    "parameter_groups",
    "save_catseg",
]

from loraseg.segment.open_vocabulary.catseg.checkpoint import load_catseg, save_catseg
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.from_clip import catseg_from_clip
from loraseg.segment.open_vocabulary.catseg.layout import official_state_dict
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from loraseg.segment.open_vocabulary.catseg.trainable import freeze_clip, parameter_groups
