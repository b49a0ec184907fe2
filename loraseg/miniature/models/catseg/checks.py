"""Acceptance checks of the miniature CAT-Seg on scenes outside its training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from loraseg.miniature.models.catseg.training import HELD_OUT
from loraseg.miniature.models.clip.model import normalise
from loraseg.miniature.world.canvas import CLASSES, class_id
from loraseg.miniature.world.captions import PROMPT, tokenizer
from loraseg.miniature.world.domains import BASE_DOMAINS, DOMAINS
from loraseg.miniature.world.render import render
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["catseg_report", "domain_iou"]

_BATCH = 20
# Wrong names for the held-out class; pixels found by them are not due to its name.
_CONTROL_NAMES = ("photo", "night", "car")


def catseg_report(model: CATSeg, *, seed: int = 0, scenes: int = 40) -> dict[str, Any]:
    """Measure mIoU by domain, the IoU of the held-out class, and the same under wrong names.

    All scenes are drawn with the key "gates", which no training uses. The model gets all 12 class
    names and no other information on the classes.
    """
    domains = {name: domain_iou(model, name, CLASSES, seed=seed, scenes=scenes) for name in DOMAINS}
    held = class_id(HELD_OUT)
    controls = {
        name: {
            domain: _round4(
                domain_iou(model, domain, _rename(name), seed=seed, scenes=scenes)[1][held]
            )
            for domain in BASE_DOMAINS
        }
        for name in _CONTROL_NAMES
    }
    base = [domains[name][0] for name in BASE_DOMAINS]
    held_out_iou = {name: _round4(domains[name][1][held]) for name in BASE_DOMAINS}
    return {
        "base_miou": round(float(np.mean(base)), 4),
        "miou_by_domain": {name: round(miou, 4) for name, (miou, _) in domains.items()},
        "iou_base_domain_first": dict(
            zip(CLASSES, np.round(domains[BASE_DOMAINS[0]][1], 3).tolist(), strict=True)
        ),
        "held_out": HELD_OUT,
        "held_out_iou": held_out_iou,
        "held_out_iou_mean": round(float(np.mean(list(held_out_iou.values()))), 4),
        "held_out_iou_renamed": controls,
        "held_out_iou_renamed_max": max(max(iou.values()) for iou in controls.values()),
        "setting": {"seed": seed, "scenes_per_domain": scenes, "base_domains": BASE_DOMAINS},
    }


@torch.inference_mode()
def domain_iou(
    model: CATSeg, domain: str, names: Sequence[str], *, seed: int, scenes: int
) -> tuple[float, ndarray]:
    """Return the mIoU and the (12,) IoU by class of a domain, given 12 names in class order."""
    images, masks = render(domain, scenes, seed, "gates")
    text = model.encode_text(tokenizer()([PROMPT.format(name) for name in names]))[:, None]
    matrix = ConfusionMatrix(len(CLASSES))
    for start in range(0, scenes, _BATCH):
        batch = normalise(torch.from_numpy(images[start : start + _BATCH]))
        labels = model(batch, text).argmax(1).numpy()
        matrix.add(masks[start : start + _BATCH], labels)
    return float(matrix.miou()), matrix.iou()


def _rename(other: str) -> list[str]:
    return [other if name == HELD_OUT else name for name in CLASSES]


def _round4(value: float) -> float:
    return round(float(value), 4)
