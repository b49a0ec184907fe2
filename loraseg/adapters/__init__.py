"""Adapters: what they are, how they are stored and exchanged, and which layers they change."""

__all__ = [
    "Adapter",
    "LayerReport",
    "LayerScore",
    "LoraPair",
    "PackedAdapter",
    "Projection",
    "adapter_files",
    "alpha_modules",
    "attention_projections",
    "diffusers_files",
    "files_digest",
    "kohya_file",
    "load_adapter",
    "pack",
    "pairs_of",
    "read_diffusers",
    "read_kohya",
    "save_adapter",
    "select_projections",
    "targets",
]

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.exchange import diffusers_files, kohya_file, read_diffusers, read_kohya
from loraseg.adapters.inject import targets
from loraseg.adapters.layer_report import LayerReport, LayerScore
from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.adapters.peft_io import (
    adapter_files,
    files_digest,
    load_adapter,
    pairs_of,
    save_adapter,
)
from loraseg.adapters.projections import (
    Projection,
    alpha_modules,
    attention_projections,
    select_projections,
)
