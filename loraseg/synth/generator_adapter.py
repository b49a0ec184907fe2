"""Adapters of the text-to-image model, with their weight and attention mix."""

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
    """LoRA pairs of UNet layers with a weight and an optional attention mix.

    Attributes:
        adapter: The packed LoRA pairs.
        weight: Factor of the pairs; any finite number.
        attention_mix: Layers that mix plain and rectified attention; None without them.
        trained_with: Digests of the adapters that were active during its training; None if
            unknown.

    Raises:
        AdapterMismatchError: The weight is not finite.
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
        """Pack an adapter and wrap it.

        Raises:
            AdapterMismatchError: The adapter is not a plain sum of low-rank products (DoRA, rsLoRA,
                biases), or the weight is not finite.
        """
        return cls(adapter=pack(adapter), weight=weight, attention_mix=attention_mix)


def check_base(adapters: Sequence[GeneratorAdapter], base_name: str, base_digest: str) -> None:
    """Check that the adapters with a known base digest were trained on this base.

    Raises:
        AdapterMismatchError: An adapter was trained on another base.
    """
    for generator_adapter in adapters:
        adapter = generator_adapter.adapter
        if adapter.base_digest is not None and adapter.base_digest != base_digest:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r}: trained on base {adapter.base_digest[:12]}, expected "
                f"{base_digest[:12]} ({base_name})"
            )


def find_attention_mix(adapters: Sequence[GeneratorAdapter]) -> AttentionMix | None:
    """Return the attention mix of the one adapter that has one; None if no adapter does.

    Raises:
        AdapterMismatchError: Several adapters have an attention mix.
    """
    owners = [owner for owner in adapters if owner.attention_mix is not None]
    if len(owners) > 1:
        names = ", ".join(repr(owner.adapter.name) for owner in owners)
        raise AdapterMismatchError(
            f"adapters {names} have an attention mix; expected at most one adapter with one"
        )
    return owners[0].attention_mix if owners else None


def warn_untested_combination(adapters: Sequence[GeneratorAdapter]) -> None:
    """Log a warning for adapters that are combined differently than in their training.

    LoRA updates are additive and commute, but an adapter is trained to correct a model in which
    certain others are active. Of two adapters that are used together, one must therefore have been
    trained with the other, and all adapters that one was trained with must be in use.
    """
    names = {first.adapter.digest: first.adapter.name for first in adapters}
    for first in adapters:
        for digest in first.trained_with or ():
            if digest not in names:
                logger.warning(
                    "adapter %r was trained with adapter %s active, which is not in use",
                    first.adapter.name,
                    digest[:12],
                )
    for index, first in enumerate(adapters):
        for second in adapters[index + 1 :]:
            if _trained_separately(first, second):
                logger.warning(
                    "adapters %r and %r are used together, but neither was trained with the other",
                    first.adapter.name,
                    second.adapter.name,
                )


def _trained_separately(first: GeneratorAdapter, second: GeneratorAdapter) -> bool:
    if first.trained_with is None or second.trained_with is None:
        return False
    digests = first.adapter.digest, second.adapter.digest
    together = digests[1] in first.trained_with or digests[0] in second.trained_with
    return not together and digests[0] != digests[1]
