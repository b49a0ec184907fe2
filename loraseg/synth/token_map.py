"""Positions of words in tokenised prompts, found with the tokenizers of the pipeline."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loraseg.errors import ConfigError, DatasetError
from loraseg.tensor_types import Int, ndarray

__all__ = ["TokenMap"]


class TokenMap:
    """Counts the tokens of words and finds their positions in a prompt.

    A prompt and its pieces are tokenised separately. If the concatenated tokens of the pieces
    differ from those of the prompt, a word is tokenised differently in its context and has no
    well-defined span, which is an error.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        """Keep the tokenizers of a pipeline: one for SD, two for SDXL.

        Raises:
            ConfigError: There are none, or their maximum lengths differ.
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
        """Maximum number of tokens of a prompt, start and end not counted."""
        return self.length - self._special_tokens

    def count_tokens(self, text: str, where: str) -> int:
        """Return the number of tokens of a text.

        Raises:
            DatasetError: The text contains a start, end or unknown token.
            ConfigError: The tokenizers disagree.
        """
        counts = [len(_token_ids(tokenizer, text, where)) for tokenizer in self._tokenizers]
        if len(set(counts)) != 1:
            raise ConfigError(
                f"{where}: the tokenizers give {counts} tokens for {text!r}, expected equal counts"
            )
        return counts[0]

    def token_classes(
        self, prompt: str, pieces: Sequence[str], classes: Sequence[int]
    ) -> Int[ndarray, " l"]:
        """Return the class of each token of a prompt.

        Args:
            prompt: The prompt.
            pieces: The parts of the prompt, in order.
            classes: Class id of each piece; -1 for pieces that are not class names.

        Returns:
            (length,) int64; -1 also for start, end and padding.

        Raises:
            ConfigError: The tokens of the pieces are not those of the prompt, or differ in
                position between the tokenizers.
        """
        first, *others = (
            self._token_classes(tokenizer, prompt, pieces, classes)
            for tokenizer in self._tokenizers
        )
        for other in others:
            if not np.array_equal(first, other):
                raise ConfigError(
                    f"prompt {prompt!r}: the two tokenizers put class names at different positions"
                )
        return first

    def _token_classes(
        self, tokenizer: Any, prompt: str, pieces: Sequence[str], classes: Sequence[int]
    ) -> Int[ndarray, " l"]:
        piece_tokens = [_token_ids(tokenizer, piece, f"prompt {prompt!r}") for piece in pieces]
        joined = [token for tokens in piece_tokens for token in tokens]
        padded = list(
            tokenizer(
                prompt, padding="max_length", max_length=self.length, truncation=True
            ).input_ids
        )
        start = int(padded[0] == tokenizer.bos_token_id)
        if padded[start : start + len(joined)] != joined:
            raise ConfigError(
                f"prompt {prompt!r}: its words have other tokens alone than in the prompt; "
                "separate the template's text from {classes} by a blank"
            )
        token_classes = np.full(self.length, -1, dtype=np.int64)
        spans = np.repeat(np.asarray(classes, dtype=np.int64), list(map(len, piece_tokens)))
        token_classes[start : start + len(spans)] = spans
        return token_classes


def _token_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """Return the token ids of a text without start and end."""
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    invalid = next((token for token in tokens if token in special), None)
    if invalid is not None:
        raise DatasetError(
            f"{where}: {text!r} contains the token {tokenizer.convert_ids_to_tokens(invalid)!r}; "
            "expected text without special tokens; set another word for the class"
        )
    return tokens
