"""Captions, class prompts, synonyms and the vocabulary of the miniature CLIP."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from loraseg.backbones.tokenizer import WordTokenizer, split_words
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.domains import DOMAINS

__all__ = [
    "LABEL_NAMES",
    "PROMPT",
    "SYNONYMS",
    "TEMPLATES",
    "caption",
    "class_word",
    "tokenizer",
    "vocabulary",
]

PROMPT = "A photo of a {} in the scene"
TEMPLATES = (PROMPT, "a street with a {}", "a {}", "a scene with a {}", "a photo of a {}")
_OPENINGS = ("a street with ", "a photo of ", "a scene with ", "a photo of a street with ")

# Synonyms of the classes; captions use one of them with some probability.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "mountain": ("hill",),
    "building": ("house",),
    "tree": ("vegetation", "bush"),
    "grass": ("terrain", "lawn"),
    "sidewalk": ("pavement", "footpath"),
    "road": ("asphalt",),
    "car": ("automobile",),
    "bus": ("coach",),
    "person": ("pedestrian", "human"),
    "pole": ("post",),
    "sign": ("traffic sign", "sign board"),
}

# Class names in the dataset folders of the world. Labels of a new domain usually have other names
# than those of the base's training: here synonyms that only the CLIP was trained on, and "vehicle",
# which no model was. Adapters bridge this shift of names in addition to the shift of appearance.
_RENAMED = {
    "mountain": "hill",
    "tree": "vegetation",
    "grass": "terrain",
    "sidewalk": "pavement",
    "car": "vehicle",
    "person": "pedestrian",
    "sign": "traffic sign",
}
LABEL_NAMES = tuple(_RENAMED.get(name, name) for name in CLASSES)

# Words of common label lists. The miniature was not trained on them, but each has an embedding of
# its own that an adapter can learn.
_LABEL_LIST_WORDS = """
    animal awning background ball banner barrier bed bench bicycle bicyclist bike billboard bin bird
    bottle box branch bridge bush cabinet camera cat ceiling cell chair child clutter column cone
    crop crosswalk crowd curb cyclist desk dirt dog door driver fence field floor flower foliage
    fruit furniture gate glass ground guard head hydrant impervious kerb lake lamp lane leaf light
    line low man marking mirror moon motorcycle motorcyclist nucleus object other paper parking path
    picture plant pot rail railing rider river rock roof sand screen sea shelf shrub signal soil
    stairs stem stone store streetlight sun surface symbol table text tower track traffic trailer
    train truck tunnel unlabelled van vehicle void wall water weed wheel window woman
"""


def vocabulary() -> tuple[str, ...]:
    """Return all words in the order of their ids."""
    texts = [*TEMPLATES, *_OPENINGS, *CLASSES, _LABEL_LIST_WORDS, "and with large small the is in"]
    for names in SYNONYMS.values():
        texts.extend(names)
    for domain in DOMAINS.values():
        texts.extend(domain.phrases)
    return tuple(sorted({word for text in texts for word in split_words(text)}))


def tokenizer() -> WordTokenizer:
    """Return the tokenizer of the miniature CLIP."""
    return WordTokenizer(vocabulary())


def class_word(name: str, generator: np.random.Generator, synonyms: float = 0.2) -> str:
    """Return the class name or, with the given probability, one of its synonyms."""
    others = SYNONYMS.get(name, ())
    if others and generator.random() < synonyms:
        return others[int(generator.integers(len(others)))]
    return name


def caption(present: ndarray, phrases: Sequence[str], generator: np.random.Generator) -> str:
    """Return a caption with up to six of the present classes and, in 90 % of cases, the domain.

    Args:
        present: (c,) booleans, the classes in the image; may be all false.
        phrases: Phrases that describe the domain.
        generator: Source of randomness.
    """
    shown = generator.permutation(np.flatnonzero(present))[: int(generator.integers(2, 7))]
    names = [f"a {class_word(CLASSES[label], generator)}" for label in shown]
    text = _OPENINGS[int(generator.integers(len(_OPENINGS)))] + " and ".join(names)
    if generator.random() < 0.9:
        text += " " + phrases[int(generator.integers(len(phrases)))]
    return text
