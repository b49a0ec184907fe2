"""Prompts from class names: the words of the classes by rising id, inside a template.

FreestyleNet (arXiv 2303.14412) and MatchMask join the names of the classes in a mask by blanks; the
template around them is an addition.
"""

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
    """Return the word of each class in prompts; None for a background without a word.

    Args:
        label_space: The classes.
        words: Words that replace class names which mean something else to the text model (ADE's
            "earth" is "ground"); keys are names of the label space, in any case.
        background_word: The word of a class named "background"; None for no word.

    Raises:
        ConfigError: A key of ``words`` is not a class name.
    """
    chosen: list[str | None] = list(label_space.names)
    for index, name in enumerate(label_space.names):
        if name.casefold() == _BACKGROUND:
            chosen[index] = background_word
    for name, word in words.items():
        try:
            index = label_space.index(name)
        except DatasetError as error:
            folded = {name.casefold(): name for name in label_space.names}
            near = difflib.get_close_matches(name.casefold(), folded, n=1)
            hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
            raise ConfigError(f"words: no class {name!r}{hint}") from error
        chosen[index] = word
    return tuple(None if word is None else " ".join(word.split()) for word in chosen)


def split_template(template: str) -> tuple[str, str]:
    """Return the text before and after the class names.

    Raises:
        ConfigError: The template does not contain ``{classes}`` exactly once, or has other braces.
    """
    before, placeholder, after = template.partition(_PLACEHOLDER)
    if not placeholder or any(brace in before + after for brace in "{}"):
        raise ConfigError(
            f"template {template!r}: expected text with {_PLACEHOLDER} exactly once and no "
            f"other braces"
        )
    return before, after


def build_prompt(template: str, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the prompt and its pieces: text before, each word, text after.

    Words are joined by one space. Without words, the blanks around the placeholder become one.
    """
    before, after = split_template(template)
    prompt = " ".join((before + " ".join(words) + after).split())
    return prompt, (before.strip(), *words, after.strip())
