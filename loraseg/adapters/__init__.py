"""Adapters: what they are, how they are stored (peft's format) and how they act on a model."""

__all__ = [
    "Adapter",
    "AdapterSlots",
    "LoraPair",
    "Mix",
    "adapter_files",
    "files_digest",
    "load_adapter",
    "pairs_of",
    "save_adapter",
    "targets",
]

from loraseg.adapters.adapter import Adapter, LoraPair, Mix
from loraseg.adapters.inject import AdapterSlots, targets
from loraseg.adapters.peft_io import (
    adapter_files,
    files_digest,
    load_adapter,
    pairs_of,
    save_adapter,
)
