"""Adapters: low-rank weight updates by module name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loraseg.errors import AdapterMismatchError
from loraseg.tensor_types import Float, Tensor

__all__ = ["Adapter", "LoraPair"]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The LoRA update of one linear layer: ``delta W = scale * up @ down``.

    LoRA (arXiv 2106.09685), section 4.1: ``h = W0 x + (alpha / r) B A x``.

    Attributes:
        down: A, (r, d_in), floating point.
        up: B, (d_out, r), same dtype and device as ``down``.
        scale: alpha / r (alpha / sqrt(r) for rsLoRA), finite.

    Raises:
        AdapterMismatchError: The matrices do not share a rank of at least 1, are not
            floating-point matrices of one dtype, or the scale is not finite.
    """

    down: Tensor
    up: Tensor
    scale: float

    def __post_init__(self) -> None:
        down, up = self.down, self.up
        if not (down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0):
            raise AdapterMismatchError(
                f"down {tuple(down.shape)}, up {tuple(up.shape)}; expected down (r, d_in) and "
                f"up (d_out, r) with one rank r of at least 1"
            )
        if down.dtype != up.dtype or not down.is_floating_point():
            raise AdapterMismatchError(
                f"down {down.dtype}, up {up.dtype}; expected one floating-point dtype"
            )
        if not math.isfinite(self.scale):
            raise AdapterMismatchError(f"scale {self.scale}; expected a finite number")

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """Return the dense update, which is as large as the weight."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One trained adapter; immutable, identified by its digest.

    Attributes:
        name: Display name.
        pairs: LoRA pairs by full dotted module name; at least one.
        digest: Sha256 (hex) of its files, see :func:`loraseg.adapters.peft_io.files_digest`.
        base_name: Name of the base it was trained on; None if unknown.
        base_digest: Sha256 (hex) of the base weights it was trained on; None if unknown.
        use_dora: Whether the layers are also renormalised (DoRA), which pairs cannot express.
        use_rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        bias: peft's bias mode; any value but "none" means that biases were trained.
        modules_to_save: Layers that were fully trained in addition to the pairs.

    Raises:
        AdapterMismatchError: There are no pairs.
    """

    name: str
    pairs: Mapping[str, LoraPair]
    digest: str
    base_name: str | None = None
    base_digest: str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.pairs:
            raise AdapterMismatchError(f"adapter {self.name!r}: expected at least one LoRA pair")
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))

    def unsupported_features(self) -> str | None:
        """Name a feature that the pairs do not express; None for plain LoRA."""
        if self.use_dora:
            return "DoRA magnitudes"
        if self.bias != "none":
            return f"trained biases (bias={self.bias!r})"
        if self.modules_to_save:
            return f"fully trained modules ({', '.join(self.modules_to_save)})"
        return None

    def parameter_count(self) -> int:
        """Return the number of values in all pairs."""
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs.values())
