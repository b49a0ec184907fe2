"""Adapters: what they are, how they are stored (peft's format) and which layers they change."""

__all__ = [
    "Adapter",
    "LoraPair",
    "PackedAdapter",
    "adapter_files",
    "files_digest",
    "load_adapter",
    "pack",
    "pairs_of",
    "save_adapter",
    "targets",
]

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.inject import targets
from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.adapters.peft_io import (
    adapter_files,
    files_digest,
    load_adapter,
    pairs_of,
    save_adapter,
)
