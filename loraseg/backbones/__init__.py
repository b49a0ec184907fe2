"""Frozen models: sources of weights, tokenizers, the CLIP of the index, the diffusion model."""

__all__ = [
    "BpeTokenizer",
    "ClipEncoder",
    "DiffusionBase",
    "TextEncoding",
    "WeightSource",
    "WordTokenizer",
    "load_clip",
    "load_diffusion",
    "resolve_weights",
]

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.diffusion import DiffusionBase, TextEncoding, load_diffusion
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.backbones.weights import WeightSource, resolve_weights
