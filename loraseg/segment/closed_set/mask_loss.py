"""The set loss of Mask2Former, with pixels that count nowhere.

transformers' own loss has no such pixels: to it whatever is not labelled belongs to no mask, so
that each pixel which a filter took out of a label would be learned as a hole. Here points on
ignored pixels weigh nothing; without such pixels the loss is that of transformers.
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

# Of the points that a mask is compared at: how many are drawn for one that is kept, and which
# share is kept for being the least certain.
_OVERSAMPLE_RATIO, _UNCERTAIN_SHARE = 3.0, 0.75
_NON_FINITE_COST = 1e10


@dataclass(frozen=True, slots=True)
class _GroundTruth:
    """An image's classes (n), their masks (n, h, w) and its labelled pixels (h, w), as floats."""

    classes: Tensor
    masks: Tensor
    valid: Tensor


def set_loss(
    layers: Sequence[tuple[Float[Tensor, "b q c1"], Float[Tensor, "b q mh mw"]]],
    targets: Int[Tensor, "b h w"],
    class_weights: Float[Tensor, " c1"],
    config: Any,
) -> Float[Tensor, ""]:
    """Return the loss of all layers together.

    Args:
        layers: Class logits, the last one "no object", and mask logits of the queries; the
            network's own output first.
        targets: Class ids, 255 = ignored. Images without any other pixel count nowhere.
        class_weights: Of the classes and of "no object".
        config: ``Mask2FormerConfig``: the weights of the parts and the number of points.
    """
    used = [i for i, image in enumerate(targets) if bool((image != IGNORE).any())]
    truths = [_ground_truth(targets[i]) for i in used]
    # Every output takes part, whatever is labelled: DistributedDataParallel waits for all.
    total = sum(
        (classes.sum() * 0 + masks.sum() * 0 for classes, masks in layers),
        layers[0][0].new_zeros(()),
    )
    if not truths:
        return total
    count = max(1, sum(len(truth.classes) for truth in truths))
    for classes, masks in layers:
        classes, masks = classes[used].float(), masks[used].float()
        pairs = [_match_queries(*one, config) for one in zip(classes, masks, truths, strict=True)]
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
    """Return which query answers for which of the image's classes, at the least cost."""
    from scipy.optimize import linear_sum_assignment

    points = torch.rand(1, config.train_num_points, 2, device=masks.device)
    weight = _sample_points(truth.valid[None], points, mode="nearest")[0]
    wanted = _sample_points(truth.masks, points.expand(len(truth.masks), -1, -1))
    seen = _sample_points(masks, points.expand(len(masks), -1, -1))
    share = weight.sum().clamp(min=1)
    hit = functional.binary_cross_entropy_with_logits(seen, torch.ones_like(seen), reduction="none")
    miss = functional.binary_cross_entropy_with_logits(
        seen, torch.zeros_like(seen), reduction="none"
    )
    entropy = (hit * weight / share) @ wanted.T + (miss * weight / share) @ (1 - wanted).T
    likely = seen.sigmoid()
    both = 2 * (likely * weight) @ wanted.T
    either = (likely * weight).sum(-1)[:, None] + (wanted * weight).sum(-1)[None]
    dice = 1 - (both + 1) / (either + 1)
    named = -classes.softmax(-1)[:, truth.classes]
    cost = config.mask_weight * entropy + config.class_weight * named + config.dice_weight * dice
    # What is not finite is matched last.
    cost = cost.nan_to_num(_NON_FINITE_COST, _NON_FINITE_COST, -_NON_FINITE_COST)
    queries, indices = linear_sum_assignment(cost.cpu())
    return torch.as_tensor(queries), torch.as_tensor(indices)


def _class_loss(
    classes: Tensor,
    truths: Sequence[_GroundTruth],
    pairs: Sequence[tuple[Tensor, Tensor]],
    weights: Tensor,
) -> Tensor:
    nothing = classes.shape[-1] - 1
    wanted = torch.full(classes.shape[:2], nothing, dtype=torch.int64, device=classes.device)
    for image, (truth, (queries, indices)) in enumerate(zip(truths, pairs, strict=True)):
        wanted[image, queries] = truth.classes[indices]
    return functional.cross_entropy(classes.transpose(1, 2), wanted, weights)


def _mask_loss(
    masks: Tensor,
    truths: Sequence[_GroundTruth],
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: Any,
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and dice loss of the matched masks, summed over them."""
    seen = torch.cat([image[queries] for image, (queries, _) in zip(masks, pairs, strict=True)])
    wanted = torch.cat(
        [truth.masks[indices] for truth, (_, indices) in zip(truths, pairs, strict=True)]
    )
    valid = torch.cat(
        [truth.valid.expand(len(i), -1, -1) for truth, (_, i) in zip(truths, pairs, strict=True)]
    )
    with torch.no_grad():
        points = _uncertain_points(seen, valid, config.train_num_points)
        labels = _sample_points(wanted, points)
        weight = _sample_points(valid, points, mode="nearest")
    logits = _sample_points(seen, points)
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    share = weight.mean(1).clamp(min=1 / weight.shape[1])
    entropy = ((each * weight).mean(1) / share).sum()
    likely = logits.sigmoid()
    both = 2 * (likely * labels * weight).sum(-1)
    either = (likely * weight).sum(-1) + (labels * weight).sum(-1)
    return entropy, (1 - (both + 1) / (either + 1)).sum()


def _uncertain_points(seen: Tensor, valid: Tensor, count: int) -> Tensor:
    """Return points (n, count, 2) in [0, 1]: most of them where a mask is unsure, and it matters.

    Drawn as in PointRend and Mask2Former.
    """
    drawn = torch.rand(len(seen), int(count * _OVERSAMPLE_RATIO), 2, device=seen.device)
    unsure = -_sample_points(seen, drawn).abs()
    unsure = unsure.masked_fill(_sample_points(valid, drawn, mode="nearest") == 0, -torch.inf)
    kept = int(_UNCERTAIN_SHARE * count)
    best = unsure.topk(kept, dim=1)[1]
    chosen = drawn.gather(1, best[:, :, None].expand(-1, -1, 2))
    rest = torch.rand(len(seen), count - kept, 2, device=seen.device)
    return torch.cat([chosen, rest], dim=1)


def _sample_points(maps: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """Return values (n, p) of maps (n, h, w) at points (n, p, 2) in [0, 1], x first."""
    grid = 2.0 * points[:, :, None] - 1.0
    found = functional.grid_sample(maps[:, None], grid, mode=mode, align_corners=False)
    return found[:, 0, :, 0]
