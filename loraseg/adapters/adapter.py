"""What an adapter is: low-rank corrections by module name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loraseg.errors import AdapterMismatchError
from loraseg.tensor_types import Float, Tensor

__all__ = ["Adapter", "LoraPair"]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The correction of one linear layer: ``delta W = scale * up @ down``.

    Attributes:
        down: A, (r, d_in), floating point.
        up: B, (d_out, r), same type and device as ``down``.
        scale: alpha / r (alpha / sqrt(r) for rsLoRA), finite.

    Raises:
        AdapterMismatchError: The matrices do not share a rank of at least 1, or are no floating
            point matrices of one type, or the scale is not finite.
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
                f"down {down.dtype}, up {up.dtype}; expected one floating point type"
            )
        if not math.isfinite(self.scale):
            raise AdapterMismatchError(f"scale {self.scale}; expected a finite number")

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """Return the dense correction; for checks, since it is as large as the layer."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One trained adapter; immutable, told apart by its digest.

    Attributes:
        name: What people call it.
        pairs: Corrections by full dotted module name; at least one.
        digest: sha256 (hex) of its files, as :func:`loraseg.adapters.peft_io.files_digest`.
        base_name: What the base it was trained on is called, None if unknown.
        base_digest: sha256 (hex) of the base weights it was trained on, None if unknown.
        use_dora: The layer is re-normalised as well, which a sum of products cannot express.
        use_rslora: Scaled by alpha / sqrt(r) instead of alpha / r.
        bias: peft's bias mode; anything but "none" means that biases were trained too.
        modules_to_save: Layers that were trained whole beside the low-rank pairs.

    Raises:
        AdapterMismatchError: There is no pair at all.
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
        """Name what this adapter has besides its pairs, None if they say everything."""
        if self.use_dora:
            return "DoRA magnitudes"
        if self.bias != "none":
            return f"trained biases (bias={self.bias!r})"
        if self.modules_to_save:
            return f"whole trained modules ({', '.join(self.modules_to_save)})"
        return None

    def parameter_count(self) -> int:
        """Count the values in all pairs."""
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs.values())
