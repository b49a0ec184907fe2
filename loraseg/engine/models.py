"""The models of one base, for adapters that act on the CLIP attention and for those that do not."""

import logging

from loraseg.engine.assemble import AttentionLora, Precision, placed
from loraseg.engine.shelf import Attention
from loraseg.segment.base import SegmentationBase, load_base
from loraseg.segment.pool import AdapterCache
from loraseg.segment.predictor import Mode, Predictor
from loraseg.segment.runner import Runner

__all__ = ["Models"]

logger = logging.getLogger(__name__)


class Models:
    """Gives a runner for either kind; the second is made when it is needed.

    Libraries differ in what their adapters were trained with, and a library's first adapters may
    come long after the service has started. Both models share their weights.
    """

    def __init__(
        self, spec: str, *, attention: AttentionLora, precision: Precision, mode: Mode
    ) -> None:
        """Load one model.

        Args:
            spec: As for :func:`~loraseg.segment.base.load_base`.
            attention: ``active`` or ``inert`` whatever adapters say, or ``as_trained``.
            precision: What it computes in.
            mode: As of :class:`~loraseg.segment.predictor.Predictor`.

        Raises:
            LorasegError: As :func:`~loraseg.segment.base.load_base`.
        """
        self._spec = spec
        self._precision: Precision = precision
        self._mode: Mode = mode
        self._fixed: Attention | None = None if attention == "as_trained" else attention
        first = self._fixed or "active"
        self.base = placed(load_base(spec, clip_attention_lora=first), precision)
        self._bases: dict[Attention, SegmentationBase] = {first: self.base}
        self._runners: dict[Attention, Runner] = {}

    def runner(self, attention: Attention | None, cache: AdapterCache) -> Runner:
        """Return a runner; one thread at a time. None stands for any, as the bare base is one."""
        kind = self._fixed or attention or next(iter(self._bases))
        if kind not in self._runners:
            self._runners[kind] = Runner(Predictor(self._base(kind), mode=self._mode), cache)
        return self._runners[kind]

    def _base(self, kind: Attention) -> SegmentationBase:
        if kind not in self._bases:
            logger.info("loading the base a second time, with CLIP attention %s", kind)
            spec = f"{self._spec.split('#')[0]}#sha256={self.base.digest}"
            base = placed(load_base(spec, clip_attention_lora=kind), self._precision)
            base.model.load_state_dict(self.base.model.state_dict(), assign=True)
            self._bases[kind] = base
        return self._bases[kind]
