"""A frozen base with the CLIP attention LoRA active and inert, sharing its weights."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from loraseg.backbones.device import best_device
from loraseg.inference.config import Precision, SegmenterConfig
from loraseg.inference.selection import AttentionLoraState
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base

__all__ = ["ModelVariants"]

logger = logging.getLogger(__name__)

_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelVariants:
    """Loads a base once for each kind of CLIP attention; the second only when it is needed.

    Libraries differ in what their adapters were trained with, and the first adapters of a library
    may be published long after a service has started. Not thread-safe.
    """

    def __init__(self, config: SegmenterConfig) -> None:
        """Load one variant.

        Args:
            config: Base, precision and ``clip_attention_lora``; ``active`` and ``inert`` there
                override the adapters' recipes.

        Raises:
            LorasegError: As :func:`~loraseg.segment.open_vocabulary.base.load_base`.
        """
        self._spec, self._dtype = config.base, _DTYPES[config.precision]
        forced = config.clip_attention_lora
        self._forced: AttentionLoraState | None = None if forced == "as_trained" else forced
        first = self._forced or "active"
        self.base = self._load(self._spec, first)
        self._bases: dict[AttentionLoraState, SegmentationBase] = {first: self.base}

    def get(self, attention: AttentionLoraState | None = None) -> SegmentationBase:
        """Return the base on this process's device; any variant for None."""
        if self._forced or attention is None:
            return self.base
        if attention not in self._bases:
            logger.info("loading the base a second time, with CLIP attention LoRA %s", attention)
            spec = f"{self._spec.split('#')[0]}#sha256={self.base.digest}"
            base = self._load(spec, attention)
            base.model.load_state_dict(self.base.model.state_dict(), assign=True)
            self._bases[attention] = replace(base, name=self.base.name)
        return self._bases[attention]

    def _load(self, spec: str, attention: AttentionLoraState) -> SegmentationBase:
        base = load_base(spec, clip_attention_lora=attention)
        base.model.to(best_device(), self._dtype)
        return base
