"""Prompts from class names: the words in the order of their ids, inside a template."""

import difflib
from collections.abc import Mapping, Sequence

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError

__all__ = ["build_prompt", "class_words", "split_template"]

_PLACEHOLDER = "{classes}"
_BACKGROUND = "background"


def class_words(
    label_space: LabelSpace, words: Mapping[str, str], background_word: str | None
) -> tuple[str | None, ...]:
    """Return the word of each class in prompts; None for a background that has none.

    Args:
        label_space: The classes.
        words: Other words for class names that mean something else to the text model
            (ADE's "earth" is "ground"); keys as in the label space, in any case.
        background_word: The word of a class named "background", if any.

    Raises:
        ConfigError: ``words`` names no class, or gives one an empty word.
    """
    chosen: list[str | None] = list(label_space.names)
    for index, name in enumerate(label_space.names):
        if name.casefold() == _BACKGROUND:
            chosen[index] = background_word
    for name, word in words.items():
        try:
            index = label_space.index(name)
        except DatasetError as error:
            folded = {known.casefold(): known for known in label_space.names}
            near = difflib.get_close_matches(name.casefold(), folded, n=1)
            hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
            raise ConfigError(f"words: no class {name!r}{hint}") from error
        chosen[index] = word
    return tuple(None if word is None else " ".join(word.split()) for word in chosen)


def split_template(template: str) -> tuple[str, str]:
    """Return what stands before and after the class names.

    Raises:
        ConfigError: The template holds ``{classes}`` not exactly once, or other braces.
    """
    before, slot, after = template.partition(_PLACEHOLDER)
    if not slot or any(brace in before + after for brace in "{}"):
        raise ConfigError(
            f"template {template!r}: expected text with {_PLACEHOLDER} exactly once and no "
            f"other braces"
        )
    return before, after


def build_prompt(template: str, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the prompt, and the pieces it is made of: before, each word, after.

    Words are joined by one space; without words the blanks around their place are tidied.
    """
    before, after = split_template(template)
    prompt = " ".join((before + " ".join(words) + after).split())
    return prompt, (before.strip(), *words, after.strip())
