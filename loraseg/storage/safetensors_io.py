"""Safetensors files whose bytes depend on nothing but their content."""

import json
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

__all__ = ["encode_safetensors"]


def encode_safetensors(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; equal arguments give equal bytes.

    safetensors writes several header strings in an order that changes from run to run, and with
    it the digest that adapters remember their base by. Here they are sorted.

    Args:
        tensors: By name; written from the CPU.
        header: Strings for the ``__metadata__`` entry.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, dict(header))
    size = int.from_bytes(data[:8], "little")
    names = json.loads(data[8 : 8 + size])
    text = json.dumps(
        {"__metadata__": dict(sorted(header.items())), **_without_metadata(names)},
        separators=(",", ":"),
    ).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _without_metadata(names: dict[str, object]) -> dict[str, object]:
    return {name: entry for name, entry in names.items() if name != "__metadata__"}
