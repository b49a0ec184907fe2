"""Conditions of the generator: prompt, token classes and regions of a mask.

FreestyleNet (arXiv 2303.14412), text and mask of rectified cross-attention, as used by MatchMask
(CVPR 2026). Differences: class names may have any number of tokens; prompts that are too long drop
their smallest classes; ignored pixels are conditioned on the nearest class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.nearest_fill import fill_ignored
from loraseg.synth.prompts import build_prompt, class_words, split_template
from loraseg.synth.token_map import TokenMap
from loraseg.tensor_types import Int, UInt8, ndarray

__all__ = ["Condition", "Conditioner", "ConditioningConfig", "Downsampling"]

Downsampling = Literal["nearest", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Settings for prompts and regions of masks.

    Attributes:
        template: Text with ``{classes}`` once, e.g. ``{classes} in heavy fog``; all pixels attend
            to its other words.
        background_word: Word of a class named "background"; None leaves it out of the prompt.
        words: Words that replace class names which mean something else to the text model.
        downsampling: ``nearest``, or ``max`` for thin objects
            (:class:`~loraseg.synth.regions.Regions`).

    Raises:
        ConfigError: The template does not contain ``{classes}`` exactly once.
    """

    template: str = "{classes}"
    background_word: str | None = None
    words: dict[str, str] = field(default_factory=dict[str, str])
    downsampling: Downsampling = "nearest"

    def __post_init__(self) -> None:
        split_template(self.template)


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """The condition made from one mask.

    Attributes:
        prompt: The words of its classes by rising id, in the template.
        token_classes: (l,) class id of each token; -1 for start, end, padding and template.
        regions: (h, w) classes for conditioning: ignored pixels have the nearest class; pixels of
            255 attend only to tokens without a class.
        label: (h, w) label of the generated images: the mask, with 255 where a class was dropped.
        classes: Ids of the classes in the prompt, ascending.
        dropped: Ids of the classes left out because the prompt would be too long, ascending.
        downsampling: How ``regions`` is reduced to the resolution of a layer.
    """

    prompt: str
    token_classes: Int[ndarray, " l"]
    regions: UInt8[ndarray, "h w"]
    label: UInt8[ndarray, "h w"]
    classes: tuple[int, ...]
    dropped: tuple[int, ...]
    downsampling: Downsampling = "nearest"


class Conditioner:
    """Makes conditions from masks, for one label space and the tokenizers of one pipeline."""

    def __init__(
        self, tokenizers: Sequence[Any], label_space: LabelSpace, config: ConditioningConfig
    ) -> None:
        """Tokenise every class name once.

        Args:
            tokenizers: The tokenizers of the pipeline; two must agree on the position of each word.
            label_space: Class of each id in the masks.
            config: Template, words and downsampling.

        Raises:
            ConfigError: ``words`` names an unknown class, the template is too long, or the
                tokenizers disagree.
            DatasetError: A class name has no tokens, a special token, or too many tokens.
        """
        self.label_space = label_space
        self.config = config
        self._tokens = TokenMap(tokenizers)
        self._words = class_words(label_space, config.words, config.background_word)
        before, after = (part.strip() for part in split_template(config.template))
        where = f"template {config.template!r}"
        self._max_class_tokens = self._tokens.max_tokens - sum(
            self._tokens.count_tokens(part, where) for part in (before, after)
        )
        if self._max_class_tokens < 1:
            raise ConfigError(
                f"{where}: it leaves {self._max_class_tokens} of {self._tokens.max_tokens} "
                f"tokens for class names, expected at least 1"
            )
        self._token_counts = {
            index: self._token_count(index, word)
            for index, word in enumerate(self._words)
            if word is not None
        }

    def __call__(self, mask: ndarray, *, where: str = "mask") -> Condition:
        """Return the condition of a mask.

        If the class names have too many tokens, the class with the fewest pixels is dropped (of
        equal ones that with the larger id) until they fit; its pixels become 255. A mask that
        contains only a background without a word has a prompt without classes.

        Args:
            mask: (h, w) uint8, ids of the label space or 255; not modified.
            where: Name of the mask in error messages.

        Raises:
            DatasetError: The mask is empty, of another dtype or shape, contains unknown ids, or
                ignores every pixel.
            ConfigError: A word is tokenised differently inside the prompt than alone.
        """
        pixel_counts = self._pixel_counts(mask, where)
        classes, dropped = self._select_classes(pixel_counts)
        words = [word for index in classes if (word := self._words[index]) is not None]
        prompt, pieces = build_prompt(self.config.template, words)
        region_ids = np.full(256, IGNORE, dtype=np.uint8)
        region_ids[list(classes)] = classes
        label_ids = np.arange(256, dtype=np.uint8)
        label_ids[list(dropped)] = IGNORE
        return Condition(
            prompt=prompt,
            token_classes=self._tokens.token_classes(prompt, pieces, (-1, *classes, -1)),
            regions=region_ids[fill_ignored(mask)],
            label=label_ids[mask],
            classes=classes,
            dropped=dropped,
            downsampling=self.config.downsampling,
        )

    def _token_count(self, index: int, word: str) -> int:
        where = f"class {index} ({self.label_space.names[index]!r})"
        length = self._tokens.count_tokens(word, where)
        if not 1 <= length <= self._max_class_tokens:
            raise DatasetError(
                f"{where}: its word {word!r} has {length} tokens, expected 1 to "
                f"{self._max_class_tokens}; set another word in words"
            )
        return length

    def _pixel_counts(self, mask: ndarray, where: str) -> dict[int, int]:
        """Return the number of pixels of each class in a mask, by ascending id."""
        if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
            raise DatasetError(
                f"{where}: got {mask.dtype} {mask.shape}, expected uint8 (h, w), not empty"
            )
        counts = np.bincount(mask.ravel(), minlength=256)
        present = [int(index) for index in np.flatnonzero(counts) if index != IGNORE]
        unknown = [index for index in present if index >= len(self.label_space)]
        if unknown:
            raise DatasetError(
                f"{where}: got class ids {unknown[:8]}, expected 0 to "
                f"{len(self.label_space) - 1} or {IGNORE}"
            )
        if not present:
            raise DatasetError(f"{where}: every pixel is ignored, expected at least one class")
        return {index: int(counts[index]) for index in present}

    def _select_classes(
        self, pixel_counts: dict[int, int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of the classes that fit into the prompt, and those of the others."""
        with_word = [index for index in pixel_counts if index in self._token_counts]
        dropped: list[int] = []
        smallest_first = sorted(with_word, key=lambda index: (pixel_counts[index], -index))
        total = sum(self._token_counts[index] for index in with_word)
        for index in smallest_first:
            if total <= self._max_class_tokens:
                break
            total -= self._token_counts[index]
            dropped.append(index)
        classes = tuple(index for index in with_word if index not in dropped)
        return classes, tuple(sorted(dropped))
