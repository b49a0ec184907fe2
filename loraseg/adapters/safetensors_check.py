"""Checks for untrusted safetensors bytes: the header is validated before tensors are read."""

from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError

from loraseg.errors import IntegrityError
from loraseg.storage.json_io import parse_json_object
from loraseg.tensor_types import Tensor

__all__ = ["MAX_HEADER_BYTES", "read_header", "read_tensors", "require_dtype", "require_finite"]

MAX_HEADER_BYTES = 2**24
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def read_header(data: bytes, where: str) -> dict[str, Any]:
    """Return the header: entries by tensor name, and ``__metadata__`` if the file has it.

    Raises:
        IntegrityError: The header is too large, truncated, not a JSON object or repeats a name.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < size <= min(len(data) - 8, MAX_HEADER_BYTES):
        raise IntegrityError(
            f"{where}: header of {size} bytes in a file of {len(data)} bytes "
            f"(at most {MAX_HEADER_BYTES} allowed)"
        )
    return parse_json_object(
        data[8 : 8 + size], f"{where}: header", max_bytes=MAX_HEADER_BYTES, error=IntegrityError
    )


def require_dtype(entry: object, key: str, where: str) -> None:
    """Check that a header entry has a floating-point dtype.

    Raises:
        IntegrityError: The dtype is another one.
    """
    dtype = cast(dict[str, Any], entry).get("dtype") if isinstance(entry, dict) else None
    if dtype not in _FLOAT_DTYPES:
        raise IntegrityError(
            f"{where}: {key[:200]!r} has dtype {str(dtype)[:20]}, expected one of "
            f"{', '.join(_FLOAT_DTYPES)}"
        )


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors, of any shapes, of a file whose header was checked.

    Raises:
        IntegrityError: safetensors cannot read the file.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{where}: {error}") from error


def require_finite(tensor: Tensor, key: str, where: str) -> Tensor:
    """Return a tensor (of any shape) as float32; float64 is unchanged.

    Raises:
        IntegrityError: The tensor contains NaN or infinite values.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise IntegrityError(f"{where}: {key} contains NaN or infinite values")
    return tensor if tensor.dtype == torch.float64 else tensor.float()
