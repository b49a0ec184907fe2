import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from loraseg.miniature.models.generator.text import (
    CONTEXT_LENGTH,
    CaptionEncoder,
    build_tokenizer,
    pruned_bpe,
)
from loraseg.miniature.world.captions import vocabulary
from loraseg.miniature.world.domains import DOMAINS


def test_every_word_of_the_world_is_split_as_by_the_full_table():
    full, pruned = SimpleTokenizer(), build_tokenizer()
    for word in vocabulary():
        expected = [full.decoder[index] for index in full.encode(word)]
        ids = pruned(word, add_special_tokens=False)["input_ids"]
        assert pruned.convert_ids_to_tokens(ids) == expected, word
    ids, _ = pruned_bpe()
    assert len(pruned) == len(ids) < 1200


def test_texts_with_other_words_can_be_tokenised():
    tokenizer = build_tokenizer()
    ids = tokenizer("A Zebra, naïvely crossing!", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in ids  # it is also the token of unknown pieces
    assert tokenizer.decode(ids).replace(" ", "") == "azebra,naïvelycrossing!"


def test_prompts_are_truncated_and_padded_to_32_tokens():
    tokenizer = build_tokenizer()
    assert tokenizer.model_max_length == CONTEXT_LENGTH == 32
    for text in ("", "a car in the rain", "car " * 40):
        padded = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        assert len(padded) == CONTEXT_LENGTH
        assert CaptionEncoder().encode(text).tolist() == padded


def test_captions_name_only_present_classes():
    tokenizer, ids = build_tokenizer(), CaptionEncoder()
    present = np.zeros(12, bool)
    present[[6, 7]] = True  # road and car
    generator = np.random.default_rng(0)
    texts = [
        tokenizer.decode(ids.draw(present, DOMAINS["night"].phrases, generator), True)
        for _ in range(60)
    ]
    words = {word for text in texts for word in text.split()}
    assert {"road", "car", "night"} <= words
    assert not words & {"sky", "tree", "bus", "rain", "fog"}
