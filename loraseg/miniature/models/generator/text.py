"""Tokenizer of the miniature generator (CLIP's byte pairs, pruned), and captions as token ids."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray

from loraseg.compat import prepare_torchvision
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.captions import caption, class_word, vocabulary
from loraseg.tensor_types import Int

__all__ = ["CONTEXT_LENGTH", "CaptionEncoder", "build_tokenizer", "pruned_bpe"]

# Tokens per prompt, including start and end.
CONTEXT_LENGTH = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"


@cache
def pruned_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of CLIP's tokenizer that the words of the world use.

    Words of the world are split as by the full table, since all merges that apply to them are kept.
    All single bytes are kept as well, so any other text can be tokenised.
    """
    prepare_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    full = SimpleTokenizer()
    ranks: Any = full.bpe_ranks
    used = {merge for word in vocabulary() for merge in _merges_of(word, ranks)}
    merges = sorted(used, key=lambda merge: ranks[merge])
    letters = list(full.byte_encoder.values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["".join(merge) for merge in merges]
    return {piece: index for index, piece in enumerate([*pieces, _START, _END])}, merges


def build_tokenizer() -> Any:
    """Return a ``transformers.CLIPTokenizer`` with the pruned table and 32 tokens per prompt."""
    prepare_torchvision()
    from transformers import CLIPTokenizer

    ids, merges = pruned_bpe()
    pairs: Any = merges
    return CLIPTokenizer(vocab=ids, merges=pairs, model_max_length=CONTEXT_LENGTH)


class CaptionEncoder:
    """Draws captions of scenes as padded token ids; each word is tokenised once."""

    def __init__(self) -> None:
        self._tokenizer = build_tokenizer()
        self._word_ids: dict[str, list[int]] = {}
        self._start, self._end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id

    def draw(
        self, present: ndarray, phrases: Sequence[str], generator: np.random.Generator
    ) -> Int[ndarray, " l"]:
        """Return a caption: a sentence in 40 % of cases, else a list of classes as in MatchMask.

        Args:
            present: (c,) booleans, the classes in the image.
            phrases: Phrases that describe the domain.
            generator: Source of randomness.
        """
        if generator.random() < 0.4:
            return self.encode(caption(present, phrases, generator))
        return self.encode(_list_caption(present, phrases, generator))

    def encode(self, text: str) -> Int[ndarray, " l"]:
        """Return the ids of a text with start and end, padded with the end token."""
        ids = [self._start]
        for word in text.split():
            if word not in self._word_ids:
                pieces = self._tokenizer(word, add_special_tokens=False)["input_ids"]
                self._word_ids[word] = list(pieces)
            ids += self._word_ids[word]
        ids = [*ids[: CONTEXT_LENGTH - 1], self._end]
        return np.array(ids + [self._end] * (CONTEXT_LENGTH - len(ids)), np.int16)


def _list_caption(present: ndarray, phrases: Sequence[str], generator: np.random.Generator) -> str:
    """Return the class names, half the time ordered by id; in 30 % of cases some are left out."""
    shown = np.flatnonzero(present)
    if generator.random() < 0.3:
        shown = shown[generator.random(len(shown)) < 0.7]
    if generator.random() < 0.5:
        shown = generator.permutation(shown)
    names = [class_word(CLASSES[label], generator) for label in shown]
    if generator.random() < 0.85:
        names.append(phrases[int(generator.integers(len(phrases)))])
    return " ".join(names)


def _merges_of(word: str, ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Return the byte-pair merges of a word, in the order in which CLIP applies them."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    applied: list[tuple[str, str]] = []
    while len(pieces) > 1:
        best = min(pairwise(pieces), key=lambda pair: ranks.get(pair, 1 << 30))
        if best not in ranks:
            break
        applied.append(best)
        pieces = _merge_pair(pieces, best)
    return applied


def _merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
