"""What stays frozen: where weights come from, tokenizers, the CLIP of the index, the generator."""

__all__ = [
    "BpeTokenizer",
    "ClipEncoder",
    "DiffusionBase",
    "TextEncoding",
    "WeightSource",
    "WordTokenizer",
    "load_clip",
    "load_diffusion",
    "resolve",
]

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.diffusion import DiffusionBase, TextEncoding, load_diffusion
from loraseg.backbones.source import WeightSource, resolve
from loraseg.backbones.tokenizer import WordTokenizer
