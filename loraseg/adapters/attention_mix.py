"""The attention mix of a generator adapter: layers that mix plain and rectified attention.

They are stored in ``fusion.safetensors`` and not with the LoRA pairs, since the loaders of
diffusers refuse files that have keys without "lora". What the layers compute is described in
:class:`~loraseg.synth.region_attention.RegionControl`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from loraseg.adapters.peft_io import ATTENTION_MIX_FILE
from loraseg.adapters.safetensors_check import read_header, read_tensors, require_dtype
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.tensor_types import Tensor

__all__ = [
    "MAX_ATTENTION_MIX_BYTES",
    "AttentionMix",
    "AttentionMixMode",
    "decode_attention_mix",
    "encode_attention_mix",
]

AttentionMixMode = Literal["token", "pooled"]

_KEY = re.compile(r"(?:[A-Za-z0-9_]+\.)+alpha\.(weight|bias)")
MAX_ATTENTION_MIX_BYTES = 2**26
_MAX_LAYERS = 4096
_MODES = ("token", "pooled")


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMix:
    """The alpha layers of an adapter.

    Attributes:
        tensors: Float32, by name: ``<attention module>.alpha.weight`` (1, c) and ``.bias`` (1,).
        mode: Whether a layer predicts one share per query token (``token``) or per sample, from
            the mean of the tokens (``pooled``).
    """

    tensors: Mapping[str, Tensor]
    mode: AttentionMixMode

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the encoded file."""
        return hashlib.sha256(encode_attention_mix(self.tensors, self.mode)).hexdigest()


def encode_attention_mix(tensors: Mapping[str, Tensor], mode: AttentionMixMode) -> bytes:
    """Return the bytes of the file; equal arguments give equal bytes.

    Args:
        tensors: Weights (1, c) and biases (1,), named as in :class:`AttentionMix`.
        mode: See :class:`AttentionMix`.

    Raises:
        AdapterMismatchError: A name or shape is not as in :class:`AttentionMix`, or there are no
            tensors.
    """
    try:
        _check_tensors(tensors)
    except IntegrityError as error:
        raise AdapterMismatchError(str(error)) from error
    return encode_safetensors(
        {name: tensor.float() for name, tensor in sorted(tensors.items())}, {"mode": mode}
    )


def decode_attention_mix(data: bytes) -> AttentionMix:
    """Decode the untrusted bytes of a file.

    Raises:
        IntegrityError: The file is malformed or too large, or a tensor has a wrong name, dtype or
            shape or a value that is not finite.
    """
    if len(data) > MAX_ATTENTION_MIX_BYTES:
        raise IntegrityError(
            f"{ATTENTION_MIX_FILE}: {len(data)} bytes, at most {MAX_ATTENTION_MIX_BYTES}"
        )
    header = read_header(data, ATTENTION_MIX_FILE)
    metadata = header.pop("__metadata__", None)
    for key, entry in header.items():
        require_dtype(entry, key, ATTENTION_MIX_FILE)
    mode = metadata.get("mode") if isinstance(metadata, dict) else None
    if mode not in _MODES:
        raise IntegrityError(
            f"{ATTENTION_MIX_FILE}: mode {str(mode)[:40]!r}, expected one of {', '.join(_MODES)}"
        )
    tensors = read_tensors(data, ATTENTION_MIX_FILE)
    _check_tensors(tensors)
    return AttentionMix(tensors, mode)


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if not 1 <= len(tensors) <= 2 * _MAX_LAYERS:
        raise IntegrityError(
            f"{ATTENTION_MIX_FILE}: {len(tensors)} tensors, expected 2 for each of 1 to "
            f"{_MAX_LAYERS} layers"
        )
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise IntegrityError(
                f"{ATTENTION_MIX_FILE}: unexpected tensor {name[:200]!r}, expected names like "
                "<attention module>.alpha.weight"
            )
        partner = name.removesuffix(match[1]) + ("bias" if match[1] == "weight" else "weight")
        if partner not in tensors:
            raise IntegrityError(
                f"{ATTENTION_MIX_FILE}: {partner[:200]} is missing, but its partner exists"
            )
        fits = tensor.ndim == 2 if match[1] == "weight" else tensor.ndim == 1
        if not fits or tensor.shape[0] != 1 or not tensor.is_floating_point():
            raise IntegrityError(
                f"{ATTENTION_MIX_FILE}: {name[:200]}: {tuple(tensor.shape)} of {tensor.dtype}; "
                f"expected weight (1, c) and bias (1,) of a floating-point dtype"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(
                f"{ATTENTION_MIX_FILE}: {name[:200]} contains NaN or infinite values"
            )
