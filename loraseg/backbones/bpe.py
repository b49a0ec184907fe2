"""The byte-pair tokenizer of OpenAI's CLIP, from open_clip."""

from collections.abc import Sequence

from loraseg.compat import prepare_torchvision
from loraseg.tensor_types import Int, Tensor

__all__ = ["BpeTokenizer"]


class BpeTokenizer:
    """Token ids: start, byte pairs, end (the largest id), zeros; longer texts are truncated."""

    def __init__(self, context_length: int = 77) -> None:
        prepare_torchvision()
        from open_clip.tokenizer import SimpleTokenizer

        self.context_length = context_length
        self._tokenizer = SimpleTokenizer(context_length=context_length)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.vocab_size

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n l"]:
        """Return (n, context_length) token ids."""
        return self._tokenizer(list(texts), self.context_length)
