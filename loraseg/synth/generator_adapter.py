"""An adapter of the text-to-image model with all that goes with it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from loraseg.adapters.adapter import Adapter
from loraseg.adapters.attention_mix import AttentionMix
from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.errors import AdapterMismatchError
from loraseg.fuse.mix import check_weights

__all__ = ["GeneratorAdapter", "check_base", "find_attention_mix", "warn_untested_combination"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GeneratorAdapter:
    """Low-rank pairs of UNet layers, and what acts beside them.

    Attributes:
        adapter: The pairs, packed for mixing.
        weight: How much of it acts; any finite number.
        attention_mix: Layers that mix plain and rectified attention; None if it has none.
        trained_with: Digests of the adapters that were active while it was trained; None if
            nobody wrote that down.
    """

    adapter: PackedAdapter
    weight: float = 1.0
    attention_mix: AttentionMix | None = None
    trained_with: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_weights([float(self.weight)], 1)

    @classmethod
    def from_adapter(
        cls, adapter: Adapter, *, weight: float = 1.0, attention_mix: AttentionMix | None = None
    ) -> "GeneratorAdapter":
        """Wrap an adapter that was just trained or loaded.

        Raises:
            AdapterMismatchError: It is more than a sum of products (DoRA, rsLoRA, biases).
        """
        return cls(adapter=pack(adapter), weight=weight, attention_mix=attention_mix)


def check_base(adapters: Sequence[GeneratorAdapter], base_name: str, base_digest: str) -> None:
    """Check that adapters were trained on a base, as far as they say.

    Raises:
        AdapterMismatchError: One was trained on another.
    """
    for one in adapters:
        found = one.adapter.base_digest
        if found is not None and found != base_digest:
            raise AdapterMismatchError(
                f"adapter {one.adapter.name!r}: trained on base {found[:12]}, expected "
                f"{base_digest[:12]} ({base_name})"
            )


def find_attention_mix(adapters: Sequence[GeneratorAdapter]) -> AttentionMix | None:
    """Return the fusion layers of the one adapter that has some; None if none has.

    Raises:
        AdapterMismatchError: Several have, and attention can be mixed in one way only.
    """
    having = [one for one in adapters if one.attention_mix is not None]
    if len(having) > 1:
        names = ", ".join(repr(one.adapter.name) for one in having)
        raise AdapterMismatchError(
            f"adapters {names} all have fusion layers; expected at most one that has"
        )
    return having[0].attention_mix if having else None


def warn_untested_combination(adapters: Sequence[GeneratorAdapter]) -> None:
    """Log a warning for adapters that act in another company than they were trained in.

    Corrections add up in any order, but an adapter learned to correct a model in which certain
    others were active already (methods d.1). So of two that act together, the later one must have
    been trained with the earlier one, and whatever an adapter was trained with must act too.
    """
    names = {one.adapter.digest: one.adapter.name for one in adapters}
    for one in adapters:
        if one.trained_with is None:
            continue
        for digest in one.trained_with:
            if digest not in names:
                logger.warning(
                    "adapter %r was trained with adapter %s active, which is not in use",
                    one.adapter.name,
                    digest[:12],
                )
    for index, one in enumerate(adapters):
        for other in adapters[index + 1 :]:
            if _trained_separately(one, other):
                logger.warning(
                    "adapters %r and %r act together, but neither was trained with the other",
                    one.adapter.name,
                    other.adapter.name,
                )


def _trained_separately(one: GeneratorAdapter, other: GeneratorAdapter) -> bool:
    if one.trained_with is None or other.trained_with is None:
        return False
    met = other.adapter.digest in one.trained_with or one.adapter.digest in other.trained_with
    return not met and one.adapter.digest != other.adapter.digest
