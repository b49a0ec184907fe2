import numpy as np

from loraseg.backbones.tokenizer import split_words
from loraseg.miniature.world.captions import (
    PROMPT,
    SYNONYMS,
    TEMPLATES,
    caption,
    class_word,
    tokenizer,
    vocabulary,
)
from loraseg.miniature.world.render import CLASSES, DOMAINS


def names_of(label):
    return {CLASSES[label], *SYNONYMS.get(CLASSES[label], ())}


def test_captions_name_only_present_classes():
    generator = np.random.default_rng(0)
    for _ in range(300):
        present = generator.random(12) < 0.5
        domain = DOMAINS[list(DOMAINS)[generator.integers(len(DOMAINS))]]
        text = caption(present, domain.phrases, generator)
        for phrase in domain.phrases:
            text = text.removesuffix(" " + phrase)
        names = [part.split(" a ")[-1] for part in text.split(" and ")]
        names = [part.removeprefix("a ") for part in names if " with " not in f" {part} "]
        allowed = set().union(*(names_of(label) for label in np.flatnonzero(present)), {""})
        for name in names[1:]:
            assert name in allowed, (text, name)


def test_a_caption_has_at_most_six_classes_and_fits_the_context():
    generator = np.random.default_rng(1)
    words = tokenizer()
    for _ in range(200):
        text = caption(np.ones(12, bool), DOMAINS["negative"].phrases, generator)
        assert text.count(" and ") <= 5
        assert words([text])[0, -1] in (0, words.end)


def test_every_word_of_every_caption_is_in_the_vocabulary():
    words = set(vocabulary())
    for domain in DOMAINS.values():
        assert domain.phrases
        for phrase in domain.phrases:
            assert set(split_words(phrase)) <= words
    for text in (*TEMPLATES, *CLASSES, *(name for names in SYNONYMS.values() for name in names)):
        assert set(split_words(text.format("tree"))) <= words


def test_words_of_common_label_lists_are_in_the_vocabulary():
    lists = """road sidewalk building wall fence pole traffic light traffic sign vegetation terrain
        sky person rider car truck bus train motorcycle bicycle door window soil crop weed
        background pedestrian bicyclist column"""
    assert set(lists.split()) <= set(vocabulary())


def test_phrases_are_distinct():
    phrases = [phrase for domain in DOMAINS.values() for phrase in domain.phrases]
    assert len(set(phrases)) == len(phrases)
    assert PROMPT in TEMPLATES


def test_synonyms_have_the_given_probability():
    generator = np.random.default_rng(0)
    drawn = [class_word("tree", generator, 0.3) for _ in range(2000)]
    assert set(drawn) == {"tree", *SYNONYMS["tree"]}
    assert abs(drawn.count("tree") / 2000 - 0.7) < 0.05
    assert class_word("sky", generator, 1.0) == "sky"
