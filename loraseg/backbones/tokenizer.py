"""Text to token ids."""

import hashlib
import re
from collections.abc import Sequence

import torch

from loraseg.errors import ConfigError
from loraseg.tensor_types import Int, Tensor

__all__ = ["WordTokenizer"]

_WORD = re.compile(r"[^\W_]+")


class WordTokenizer:
    """One token a word, open to any word: those outside the vocabulary share reserved buckets.

    Ids: 0 pads, 1 starts, then the vocabulary in its order, then the buckets, and the end token
    last, because open_clip reads the text embedding at the largest id. An unknown word falls into
    a bucket by the sha256 of its letters, the same in every process.
    """

    PAD = 0
    START = 1

    def __init__(
        self, vocabulary: Sequence[str], *, context_length: int = 32, buckets: int = 64
    ) -> None:
        """Take the known words.

        Args:
            vocabulary: Lower-case words, each once; JSON-serialisable as a list.
            context_length: Tokens a text, start and end included; longer texts are cut.
            buckets: Ids shared by all unknown words.

        Raises:
            ConfigError: A word is doubled or would be split, or a size is too small.
        """
        if context_length < 3 or buckets < 1:
            raise ConfigError(
                f"context_length {context_length}, buckets {buckets}: expected at least 3 and 1"
            )
        for word in vocabulary:
            if split_words(word) != [word]:
                raise ConfigError(f"vocabulary entry {word!r}: expected one lower-case word")
        if len(set(vocabulary)) != len(vocabulary):
            raise ConfigError("the vocabulary holds a word twice")
        self.vocabulary = tuple(vocabulary)
        self.context_length = context_length
        self.buckets = buckets
        self._ids = {word: index + 2 for index, word in enumerate(self.vocabulary)}

    @property
    def end(self) -> int:
        """Id of the end token, the largest of all."""
        return 2 + len(self.vocabulary) + self.buckets

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.end + 1

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n l"]:
        """Return (n, context_length) ids: start, words, end, padding.

        Letter case, punctuation, hyphens and underscores only separate words.
        """
        ids = torch.full((len(texts), self.context_length), self.PAD, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [self._id(word) for word in split_words(text)][: self.context_length - 2]
            tokens = [self.START, *words, self.end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def _id(self, word: str) -> int:
        known = self._ids.get(word)
        if known is not None:
            return known
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return 2 + len(self.vocabulary) + number % self.buckets


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words of letters and digits."""
    return _WORD.findall(text.lower())
