"""The procedure of SemLA's official code for one image, reimplemented for comparison.

``domain_orchestrator/domain_orchestrator.py``, ``DomainOrchestrator._merge``: embed with a second
CLIP, loop over the centroids in Python, sort, ``exp(1 / (d tau))``, peft's
``add_weighted_adapter`` (cat), ``set_adapter``, forward pass, ``delete_adapter``.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

from loraseg.adapters import Adapter
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from tests.bench.plain_catseg import plain_aggregator, plain_text

__all__ = ["OfficialSemla"]


class OfficialSemla:
    """A CAT-Seg with all adapters loaded into peft, one image at a time."""

    def __init__(
        self,
        base: SegmentationBase,
        encoder: Any,
        adapters: Sequence[Adapter],
        centroids: Sequence[np.ndarray],
        *,
        k: int,
        temperature: float,
    ) -> None:
        self._base, self._encoder, self._centroids = base, encoder, list(centroids)
        self._k, self._temperature = k, temperature
        self._model = _wrapped(base.model, adapters)
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def segment(self, image: np.ndarray, classes: Sequence[str], *, stale_text: bool) -> np.ndarray:
        """Return the label map (h, w).

        Args:
            image: uint8 RGB (h, w, 3).
            classes: Names.
            stale_text: Keep the text features of the first image, as in the official code;
                otherwise encode all 77 tokens of every prompt for every image.
        """
        embedding = self._encoder.encode_images([image])[0]
        names, weights = self._choose(embedding)
        self._model.add_weighted_adapter(names, weights, "mix", combination_type="cat")
        self._model.set_adapter("mix")
        scores = self._forward(image, tuple(classes), stale_text=stale_text)
        self._model.delete_adapter("mix")
        return scores.numpy().argmax(axis=0).astype(np.uint8)

    def _choose(self, embedding: np.ndarray) -> tuple[list[str], list[float]]:
        distances: list[tuple[float, str]] = []
        for number, centroid in enumerate(self._centroids):
            distances.append((float(np.linalg.norm(embedding - centroid)), str(number)))
        nearest = sorted(distances)[: self._k]
        similar = [math.exp(1.0 / (d * self._temperature)) for d, _ in nearest]
        return [name for _, name in nearest], [value / sum(similar) for value in similar]

    def _forward(self, image: np.ndarray, classes: tuple[str, ...], *, stale_text: bool) -> Tensor:
        model: CATSeg = self._model.base_model.model
        text = self._texts.get(classes) if stale_text else None
        if text is None:
            ids = self._base.tokenize(classes).flatten(0, 1)
            text = plain_text(model.clip, ids).unflatten(0, (len(classes), -1))
            self._texts[classes] = text
        side = model.config.image_size
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        window = _resized(self._base.normalise(pixels), side, side)
        features, guidance = model.encode_images(window[None])
        logits = plain_aggregator(model.aggregator, features, text[None], guidance)[0]
        return _resized(logits.sigmoid(), *image.shape[:2])


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(
        maps[None], (height, width), mode="bilinear", align_corners=False
    )[0]


@torch.no_grad()
def _wrapped(model: CATSeg, adapters: Sequence[Adapter]) -> Any:
    rank = next(iter(adapters[0].pairs.values())).down.shape[0]
    names = list(adapters[0].pairs)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, "0")
    for number in range(1, len(adapters)):
        wrapped.add_adapter(str(number), config)
    for number, adapter in enumerate(adapters):
        for name, pair in adapter.pairs.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A[str(number)].weight.copy_(pair.down)
            layer.lora_B[str(number)].weight.copy_(pair.up * pair.scale)
    return wrapped.eval()
