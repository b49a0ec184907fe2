"""The training loss of CAT-Seg."""

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
    """Return the binary cross-entropy averaged over images, classes and pixels.

    Logits are resized to the label (bilinear, align_corners False) and compared with the one-hot
    label. Official code: ``cat_seg/cat_seg_model.py``, ``CATSeg.forward``.

    Args:
        logits: One map per class.
        label: Class ids in [0, t), or ``ignore_index``.
        ignore_index: Id of ignored pixels; must not be a class id.
        mask_ignored: False for the official loss, in which an ignored pixel has an all-zero target
            and lowers every class. True excludes ignored pixels from the mean.

    Raises:
        DatasetError: A label id is neither a class nor ``ignore_index``.
        StageError: ``mask_ignored`` is set and every pixel is ignored.
    """
    classes = logits.shape[1]
    label = label.long()
    valid = label != ignore_index
    unknown = valid & ((label < 0) | (label >= classes))
    if bool(unknown.any()):
        ids = torch.unique(label[unknown]).tolist()
        raise DatasetError(
            f"label ids {ids[:5]}: expected 0 to {classes - 1} or {ignore_index} (ignored)"
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
        raise StageError("every pixel of the batch is ignored, so the loss is undefined")
    losses = nn.functional.binary_cross_entropy_with_logits(resized, target, reduction="none")
    return (losses * valid[:, None]).sum() / count
