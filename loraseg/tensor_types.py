"""Shape annotations, e.g. ``Float[Tensor, "b c h w"]``; no-ops if jaxtyping is not installed."""

from typing import TYPE_CHECKING, Any

from numpy import ndarray
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor", "UInt", "UInt8", "ndarray"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt, UInt8
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt = UInt8 = _Unchecked
