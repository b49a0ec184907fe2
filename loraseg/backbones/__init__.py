"""What stays frozen: where weights come from, tokenizers, the CLIP of the index."""

__all__ = [
    "BpeTokenizer",
    "ClipEncoder",
    "WeightSource",
    "WordTokenizer",
    "load_clip",
    "resolve",
]

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.source import WeightSource, resolve
from loraseg.backbones.tokenizer import WordTokenizer
