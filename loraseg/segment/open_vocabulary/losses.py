"""The training loss of CAT-Seg (methods A.6)."""

import torch
from torch import Tensor, nn

from loraseg.errors import DatasetError, StageError
from loraseg.tensor_types import Float, Int, UInt8

__all__ = ["catseg_bce"]


def catseg_bce(
    logits: Float[Tensor, "b t h w"],
    label: Int[Tensor, "b H W"] | UInt8[Tensor, "b H W"],
    ignore_index: int = 255,
    *,
    mask_ignored: bool = False,
) -> Float[Tensor, ""]:
    """Return the mean binary cross-entropy of every class at every pixel.

    Logits are resized to the label (bilinear, align_corners False) and compared with the one-hot
    label.

    Args:
        logits: One map a class.
        label: Class ids in [0, t), or ``ignore_index``.
        ignore_index: Id of ignored pixels; may not be a class id.
        mask_ignored: False is the official loss: an ignored pixel has an all-zero target, counts,
            and pushes every class down. True leaves ignored pixels out of the mean.

    Raises:
        DatasetError: A label id is neither a class nor ``ignore_index``.
        StageError: Ignored pixels are left out and no other is there.
    """
    classes = logits.shape[1]
    label = label.long()
    valid = label != ignore_index
    known = (label >= 0) & (label < classes)
    if bool((valid & ~known).any()):
        wrong = torch.unique(label[valid & ~known]).tolist()
        raise DatasetError(
            f"label ids {wrong[:5]}: expected 0 to {classes - 1} or {ignore_index} (ignored)"
        )
    resized = nn.functional.interpolate(
        logits, label.shape[-2:], mode="bilinear", align_corners=False
    )
    ids = torch.arange(classes, device=label.device)[:, None, None]
    target = ((label[:, None] == ids) & valid[:, None]).to(resized.dtype)
    if not mask_ignored:
        return nn.functional.binary_cross_entropy_with_logits(resized, target)
    count = int(valid.sum()) * classes
    if not count:
        raise StageError("every pixel of the batch is ignored: there is nothing to learn from")
    each = nn.functional.binary_cross_entropy_with_logits(resized, target, reduction="none")
    return (each * valid[:, None]).sum() / count
