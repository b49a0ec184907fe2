"""A word-level tokenizer."""

import hashlib
import re
from collections.abc import Sequence

import torch

from loraseg.errors import ConfigError
from loraseg.tensor_types import Int, Tensor

__all__ = ["WordTokenizer"]

_WORD = re.compile(r"[^\W_]+")


class WordTokenizer:
    """One token per word; words outside the vocabulary share reserved buckets.

    Ids: 0 padding, 1 start, then the vocabulary in order, then the buckets, and last the end token,
    because open_clip reads the text embedding at the largest id. The bucket of an unknown word is
    given by the sha256 of the word, so it is the same in every process.
    """

    PAD = 0
    START = 1

    def __init__(
        self, vocabulary: Sequence[str], *, context_length: int = 32, buckets: int = 64
    ) -> None:
        """Assign ids to the vocabulary.

        Args:
            vocabulary: Distinct lower-case words.
            context_length: Tokens per text, start and end included; longer texts are truncated.
            buckets: Number of ids shared by all unknown words.

        Raises:
            ConfigError: A word occurs twice or consists of several words, or a size is too small.
        """
        if context_length < 3 or buckets < 1:
            raise ConfigError(
                f"context_length {context_length}, buckets {buckets}: expected at least 3 and 1"
            )
        for word in vocabulary:
            if split_words(word) != [word]:
                raise ConfigError(f"vocabulary entry {word!r}: expected one lower-case word")
        if len(set(vocabulary)) != len(vocabulary):
            raise ConfigError("vocabulary: a word occurs twice")
        self.vocabulary = tuple(vocabulary)
        self.context_length = context_length
        self.buckets = buckets
        self._ids = {word: index + 2 for index, word in enumerate(self.vocabulary)}

    @property
    def end(self) -> int:
        """Id of the end token, the largest id."""
        return 2 + len(self.vocabulary) + self.buckets

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.end + 1

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n l"]:
        """Return (n, context_length) ids: start, words, end, padding.

        Case is ignored; punctuation, hyphens and underscores separate words.
        """
        ids = torch.full((len(texts), self.context_length), self.PAD, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [self._id(word) for word in split_words(text)][: self.context_length - 2]
            tokens = [self.START, *words, self.end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def _id(self, word: str) -> int:
        index = self._ids.get(word)
        if index is not None:
            return index
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return 2 + len(self.vocabulary) + number % self.buckets


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words of letters and digits."""
    return _WORD.findall(text.lower())
