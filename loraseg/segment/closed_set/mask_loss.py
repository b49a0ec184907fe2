"""The set loss of Mask2Former (arXiv 2112.01527, section 3.3) with ignored pixels.

In the loss of transformers an unlabelled pixel belongs to no mask, so that pixels removed by a
label filter would be learned as holes. Here points on ignored pixels have weight 0. Without
ignored pixels the loss equals that of transformers (``Mask2FormerLoss``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loraseg.data.labels import IGNORE
from loraseg.tensor_types import Float, Int

__all__ = ["set_loss"]

# Points drawn per point that is kept, and share of the points kept for their uncertainty
# (PointRend, arXiv 1912.08193, section 3.3).
_OVERSAMPLE_RATIO, _UNCERTAIN_SHARE = 3.0, 0.75
_NON_FINITE_COST = 1e10


@dataclass(frozen=True, slots=True)
class _GroundTruth:
    """Labels of an image.

    Attributes:
        classes: Ids (n,) of the classes in the image.
        masks: Their masks (n, h, w), as floats.
        valid: 1 for labelled pixels (h, w), else 0.
    """

    classes: Tensor
    masks: Tensor
    valid: Tensor


def set_loss(
    layers: Sequence[tuple[Float[Tensor, "b q c1"], Float[Tensor, "b q mh mw"]]],
    targets: Int[Tensor, "b h w"],
    class_weights: Float[Tensor, " c1"],
    config: Any,
) -> Float[Tensor, ""]:
    """Return the sum of the losses of all layers.

    ``L = class_weight CE + mask_weight BCE + dice_weight dice`` on the pairs of queries and classes
    with the least total cost (Hungarian matching), as in ``Mask2FormerLoss`` of transformers.

    Args:
        layers: Class logits (the last class is "no object") and mask logits of the queries; the
            output of the last layer first.
        targets: Class ids, 255 = ignored. Images with only ignored pixels are left out.
        class_weights: Weights of the classes and of "no object".
        config: ``Mask2FormerConfig``, with the weights of the terms and the number of points.
    """
    used = [i for i, image in enumerate(targets) if bool((image != IGNORE).any())]
    truths = [_ground_truth(targets[i]) for i in used]
    # Every output enters the graph, because DistributedDataParallel waits for all gradients.
    total = sum(
        (classes.sum() * 0 + masks.sum() * 0 for classes, masks in layers),
        layers[0][0].new_zeros(()),
    )
    if not truths:
        return total
    count = max(1, sum(len(truth.classes) for truth in truths))
    for classes, masks in layers:
        classes, masks = classes[used].float(), masks[used].float()
        pairs = [
            _match_queries(image_classes, image_masks, truth, config)
            for image_classes, image_masks, truth in zip(classes, masks, truths, strict=True)
        ]
        entropy, dice = _mask_loss(masks, truths, pairs, config)
        total = total + config.class_weight * _class_loss(classes, truths, pairs, class_weights)
        total = total + (config.mask_weight * entropy + config.dice_weight * dice) / count
    return total


def _ground_truth(image: Tensor) -> _GroundTruth:
    ids = image.unique()
    ids = ids[ids != IGNORE]
    masks = (image[None] == ids[:, None, None]).float()
    return _GroundTruth(ids, masks, (image != IGNORE).float())


@torch.no_grad()
def _match_queries(
    classes: Tensor, masks: Tensor, truth: _GroundTruth, config: Any
) -> tuple[Tensor, Tensor]:
    """Return the matched pairs of least cost: indices of queries and of the image's classes."""
    from scipy.optimize import linear_sum_assignment

    points = torch.rand(1, config.train_num_points, 2, device=masks.device)
    weight = _sample_points(truth.valid[None], points, mode="nearest")[0]
    labels = _sample_points(truth.masks, points.expand(len(truth.masks), -1, -1))
    logits = _sample_points(masks, points.expand(len(masks), -1, -1))
    total = weight.sum().clamp(min=1)
    positive = functional.binary_cross_entropy_with_logits(
        logits, torch.ones_like(logits), reduction="none"
    )
    negative = functional.binary_cross_entropy_with_logits(
        logits, torch.zeros_like(logits), reduction="none"
    )
    entropy = (positive * weight / total) @ labels.T + (negative * weight / total) @ (1 - labels).T
    probability = logits.sigmoid()
    intersection = 2 * (probability * weight) @ labels.T
    union = (probability * weight).sum(-1)[:, None] + (labels * weight).sum(-1)[None]
    dice = 1 - (intersection + 1) / (union + 1)
    class_cost = -classes.softmax(-1)[:, truth.classes]
    cost = (
        config.mask_weight * entropy + config.class_weight * class_cost + config.dice_weight * dice
    )
    # Non-finite costs are matched last.
    cost = cost.nan_to_num(_NON_FINITE_COST, _NON_FINITE_COST, -_NON_FINITE_COST)
    queries, indices = linear_sum_assignment(cost.cpu())
    return torch.as_tensor(queries), torch.as_tensor(indices)


def _class_loss(
    classes: Tensor,
    truths: Sequence[_GroundTruth],
    pairs: Sequence[tuple[Tensor, Tensor]],
    weights: Tensor,
) -> Tensor:
    no_object = classes.shape[-1] - 1
    targets = torch.full(classes.shape[:2], no_object, dtype=torch.int64, device=classes.device)
    for image, (truth, (queries, indices)) in enumerate(zip(truths, pairs, strict=True)):
        targets[image, queries] = truth.classes[indices]
    return functional.cross_entropy(classes.transpose(1, 2), targets, weights)


def _mask_loss(
    masks: Tensor,
    truths: Sequence[_GroundTruth],
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: Any,
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and dice loss, summed over the matched masks."""
    matched = torch.cat([image[queries] for image, (queries, _) in zip(masks, pairs, strict=True)])
    true_masks = torch.cat(
        [truth.masks[indices] for truth, (_, indices) in zip(truths, pairs, strict=True)]
    )
    valid = torch.cat(
        [truth.valid.expand(len(i), -1, -1) for truth, (_, i) in zip(truths, pairs, strict=True)]
    )
    with torch.no_grad():
        points = _uncertain_points(matched, valid, config.train_num_points)
        labels = _sample_points(true_masks, points)
        weight = _sample_points(valid, points, mode="nearest")
    logits = _sample_points(matched, points)
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    valid_share = weight.mean(1).clamp(min=1 / weight.shape[1])
    entropy = ((losses * weight).mean(1) / valid_share).sum()
    probability = logits.sigmoid()
    intersection = 2 * (probability * labels * weight).sum(-1)
    union = (probability * weight).sum(-1) + (labels * weight).sum(-1)
    return entropy, (1 - (intersection + 1) / (union + 1)).sum()


def _uncertain_points(masks: Tensor, valid: Tensor, count: int) -> Tensor:
    """Return points (n, count, 2) in [0, 1], most of them valid and at uncertain mask logits.

    Drawn as in PointRend and Mask2Former: the most uncertain of an oversampled set, plus random
    ones.
    """
    candidates = torch.rand(len(masks), int(count * _OVERSAMPLE_RATIO), 2, device=masks.device)
    uncertainty = -_sample_points(masks, candidates).abs()
    is_invalid = _sample_points(valid, candidates, mode="nearest") == 0
    uncertainty = uncertainty.masked_fill(is_invalid, -torch.inf)
    uncertain_count = int(_UNCERTAIN_SHARE * count)
    indices = uncertainty.topk(uncertain_count, dim=1)[1]
    uncertain = candidates.gather(1, indices[:, :, None].expand(-1, -1, 2))
    random = torch.rand(len(masks), count - uncertain_count, 2, device=masks.device)
    return torch.cat([uncertain, random], dim=1)


def _sample_points(maps: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """Return the values (n, p) of maps (n, h, w) at points (n, p, 2) in [0, 1], x first."""
    grid = 2.0 * points[:, :, None] - 1.0
    values = functional.grid_sample(maps[:, None], grid, mode=mode, align_corners=False)
    return values[:, 0, :, 0]
