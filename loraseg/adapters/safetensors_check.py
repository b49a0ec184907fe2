"""Safetensors bytes of a stranger: the header is checked before any tensor is touched."""

import json
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError

from loraseg.errors import IntegrityError
from loraseg.tensor_types import Tensor

__all__ = ["MAX_HEADER_BYTES", "read_header", "read_tensors", "require_dtype", "require_finite"]

MAX_HEADER_BYTES = 2**24
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def read_header(data: bytes, where: str) -> dict[str, Any]:
    """Return the header: tensor name -> entry, and perhaps ``__metadata__``.

    Raises:
        IntegrityError: It is too large, cut off, no JSON object or holds a name twice.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < size <= min(len(data) - 8, MAX_HEADER_BYTES):
        raise IntegrityError(
            f"{where}: header of {size} bytes claimed in a file of {len(data)} "
            f"(at most {MAX_HEADER_BYTES} allowed)"
        )
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: header is not readable: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{where}: header is no JSON object")
    return cast(dict[str, Any], header)


def require_dtype(entry: object, key: str, where: str) -> None:
    """Check that a header's entry is of a floating point type.

    Raises:
        IntegrityError: It is not.
    """
    dtype = cast(dict[str, Any], entry).get("dtype") if isinstance(entry, dict) else None
    if dtype not in _FLOAT_DTYPES:
        raise IntegrityError(
            f"{where}: {key[:200]!r} has type {str(dtype)[:20]}, expected one of "
            f"{', '.join(_FLOAT_DTYPES)}"
        )


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a file whose header was checked.

    Raises:
        IntegrityError: safetensors cannot read it.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{where}: {error}") from error


def require_finite(tensor: Tensor, key: str, where: str) -> Tensor:
    """Return the tensor as float32, float64 unchanged.

    Raises:
        IntegrityError: It holds NaN or infinite values.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise IntegrityError(f"{where}: {key} holds NaN or infinite values")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _reject_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) != len(items):
        raise ValueError("a name occurs twice")
    return values
