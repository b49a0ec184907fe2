"""Which tokens of a prompt belong to which word, found with the pipeline's own tokenizers."""
# pyright: basic

from collections.abc import Sequence
from typing import Any

import numpy as np

from loraseg.errors import ConfigError, DatasetError
from loraseg.tensor_types import Int, ndarray

__all__ = ["TokenMap"]


class TokenMap:
    """Counts the tokens of words and finds their places in a prompt.

    A prompt is tokenised whole, and so are its pieces; where the pieces' tokens in a row are not
    the prompt's, a word reads differently in its context and no span would be right.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        """Take the tokenizers of a pipeline, one for SD, two for SDXL.

        Raises:
            ConfigError: None is given, or they have different lengths.
        """
        if not tokenizers:
            raise ConfigError("token map: got no tokenizer, expected those of the pipeline")
        self._tokenizers = tuple(tokenizers)
        lengths = {tokenizer.model_max_length for tokenizer in tokenizers}
        if len(lengths) != 1:
            raise ConfigError(f"tokenizers take {sorted(lengths)} tokens, expected one length")
        self.length = int(lengths.pop())
        self._special_tokens = len(tokenizers[0]("").input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens that are left beside start and end."""
        return self.length - self._special_tokens

    def count_tokens(self, text: str, where: str) -> int:
        """Return how many tokens a text makes.

        Raises:
            DatasetError: A token stands for the start, the end or what the tokenizer cannot spell.
            ConfigError: The tokenizers disagree.
        """
        counts = [len(_token_ids(tokenizer, text, where)) for tokenizer in self._tokenizers]
        if len(set(counts)) != 1:
            raise ConfigError(
                f"{where}: the tokenizers make {counts} tokens of {text!r}, expected one count"
            )
        return counts[0]

    def token_classes(
        self, prompt: str, pieces: Sequence[str], classes: Sequence[int]
    ) -> Int[ndarray, " l"]:
        """Return the class of each token of a prompt.

        Args:
            prompt: The whole prompt.
            pieces: What it consists of, in order.
            classes: One id per piece; -1 where it is not a class name.

        Returns:
            (length,) int64; -1 also for start, end and padding.

        Raises:
            ConfigError: The tokens of the pieces are not those of the prompt, or the tokenizers
                put them at different places.
        """
        first, *others = (
            self._token_classes(one, prompt, pieces, classes) for one in self._tokenizers
        )
        for other in others:
            if not np.array_equal(first, other):
                raise ConfigError(
                    f"prompt {prompt!r}: the two tokenizers put class names at different places"
                )
        return first

    def _token_classes(
        self, tokenizer: Any, prompt: str, pieces: Sequence[str], classes: Sequence[int]
    ) -> Int[ndarray, " l"]:
        parts = [_token_ids(tokenizer, piece, f"prompt {prompt!r}") for piece in pieces]
        joined = [token for part in parts for token in part]
        padded = list(
            tokenizer(
                prompt, padding="max_length", max_length=self.length, truncation=True
            ).input_ids
        )
        start = int(padded[0] == tokenizer.bos_token_id)
        if padded[start : start + len(joined)] != joined:
            raise ConfigError(
                f"prompt {prompt!r}: its words make other tokens alone than in the prompt; "
                "keep the template's text apart from {classes} by a blank"
            )
        places = np.full(self.length, -1, dtype=np.int64)
        spans = np.repeat(np.asarray(classes, dtype=np.int64), [len(part) for part in parts])
        places[start : start + len(spans)] = spans
        return places


def _token_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """Return the ids of a text without start and end."""
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    odd = next((token for token in tokens if token in marks), None)
    if odd is not None:
        raise DatasetError(
            f"{where}: {text!r} makes the token {tokenizer.convert_ids_to_tokens(odd)!r}; "
            "expected text that the tokenizer can spell; give the class another word"
        )
    return tokens
