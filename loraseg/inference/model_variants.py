"""The models of one base, for adapters that act on the CLIP attention and for those that do not."""

import logging

from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.loading import AttentionLoraSetting, Precision, to_device
from loraseg.inference.runner import SegmentRunner
from loraseg.inference.selection import AttentionLoraState
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.segment.open_vocabulary.predictor import PredictionMode, Predictor

__all__ = ["ModelVariants"]

logger = logging.getLogger(__name__)


class ModelVariants:
    """Gives a runner for either kind; the second is made when it is needed.

    Libraries differ in what their adapters were trained with, and a library's first adapters may
    come long after the service has started. Both models share their weights.
    """

    def __init__(
        self,
        spec: str,
        *,
        attention: AttentionLoraSetting,
        precision: Precision,
        mode: PredictionMode,
    ) -> None:
        """Load one model.

        Args:
            spec: As for :func:`~loraseg.segment.open_vocabulary.base.load_base`.
            attention: ``active`` or ``inert`` whatever adapters say, or ``as_trained``.
            precision: What it computes in.
            mode: As of :class:`~loraseg.segment.open_vocabulary.predictor.Predictor`.

        Raises:
            LorasegError: As :func:`~loraseg.segment.open_vocabulary.base.load_base`.
        """
        self._spec = spec
        self._precision: Precision = precision
        self._mode: PredictionMode = mode
        self._forced_attention: AttentionLoraState | None = (
            None if attention == "as_trained" else attention
        )
        first = self._forced_attention or "active"
        self.base = to_device(load_base(spec, clip_attention_lora=first), precision)
        self._bases: dict[AttentionLoraState, SegmentationBase] = {first: self.base}
        self._runners: dict[AttentionLoraState, SegmentRunner] = {}

    def get(self, attention: AttentionLoraState | None, cache: AdapterCache) -> SegmentRunner:
        """Return a runner; one thread at a time. None stands for any, as the bare base is one."""
        kind = self._forced_attention or attention or next(iter(self._bases))
        if kind not in self._runners:
            self._runners[kind] = SegmentRunner(
                Predictor(self._get_base(kind), mode=self._mode), cache
            )
        return self._runners[kind]

    def _get_base(self, kind: AttentionLoraState) -> SegmentationBase:
        if kind not in self._bases:
            logger.info("loading the base a second time, with CLIP attention %s", kind)
            spec = f"{self._spec.split('#')[0]}#sha256={self.base.digest}"
            base = to_device(load_base(spec, clip_attention_lora=kind), self._precision)
            base.model.load_state_dict(self.base.model.state_dict(), assign=True)
            self._bases[kind] = base
        return self._bases[kind]
