"""Adapters: LoRA pairs, their files and exchange formats, and the layers they are applied to."""

__all__ = [
    "Adapter",
    "LayerReport",
    "LayerScore",
    "LoraPair",
    "PackedAdapter",
    "Projection",
    "alpha_modules",
    "attention_projections",
    "extract_pairs",
    "files_digest",
    "load_adapter",
    "pack",
    "read_diffusers",
    "read_kohya",
    "save_adapter",
    "select_projections",
    "target_modules",
    "to_diffusers_files",
    "to_kohya_file",
    "to_peft_files",
]

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.exchange import read_diffusers, read_kohya, to_diffusers_files, to_kohya_file
from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.adapters.peft_io import (
    extract_pairs,
    files_digest,
    load_adapter,
    save_adapter,
    to_peft_files,
)
from loraseg.adapters.targets.catseg import target_modules
from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.unet import (
    Projection,
    alpha_modules,
    attention_projections,
    select_projections,
)
