"""CAT-Seg (Cho et al., CVPR 2024, arXiv 2303.11797) without detectron2.

The numbers agree with the official code (``cat_seg/`` of its repository). Where the paper leaves
details open, that code decides:

* Text guidance is the normalised mean over prompts. With more than ``pad_len`` classes the prompts
  are normalised first. Class attention gets the projected guidance without normalisation.
* The ``pad_len`` best classes of an image are those with the largest cosine over prompts and
  positions; with exactly ``pad_len`` classes there is neither selection nor padding.
* Padding tokens pass through the first norm of class attention; padding guidance does not pass
  through the text projection.
* The length in linear attention includes the padding rows.
* Class aggregation adds its input twice: x + upsampled(pooled x + attention + MLP).
* Guidance is concatenated after the tokens, and after the upsampled maps in the decoder.
* ``attn_mask`` distinguishes the nine regions of the rolled map, as in Swin.
* If a guidance block is the last block, its output is that of the modified last block.

Group norm of a stage with fewer than 16 channels has one group (no official model has one).
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
