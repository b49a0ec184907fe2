import hashlib

import pytest

from loraseg.backbones.tokenizer import WordTokenizer, split_words
from loraseg.errors import ConfigError

WORDS = ("a", "of", "photo", "tree")


@pytest.fixture
def tokenizer():
    return WordTokenizer(WORDS, context_length=8, buckets=5)


def test_ids_are_pad_start_words_buckets_end(tokenizer):
    assert tokenizer.end == 2 + 4 + 5
    assert tokenizer.vocab_size == 12
    assert tokenizer(["a photo of a tree"]).tolist() == [[1, 2, 4, 3, 2, 5, 11, 0]]
    assert tokenizer([""]).tolist() == [[1, 11, 0, 0, 0, 0, 0, 0]]
    assert tokenizer([]).shape == (0, 8)


def test_the_end_token_has_the_largest_id(tokenizer):
    ids = tokenizer(["a tree", "a zebra of a zebra and more and more", ""])
    assert ids.gather(1, ids.argmax(1, keepdim=True)).tolist() == [[11], [11], [11]]
    assert ids[1, -1] == 11  # a long text is truncated but keeps its end token


@pytest.mark.parametrize("text", ["A PHOTO", "a-photo", "a_photo", "  a,\tphoto. "])
def test_case_is_ignored_and_punctuation_separates(tokenizer, text):
    assert tokenizer([text]).tolist() == tokenizer(["a photo"]).tolist()


@pytest.mark.parametrize("word", ["zebra", "straße", "自転車", "42"])
def test_the_bucket_of_an_unknown_word_is_given_by_its_hash(tokenizer, word):
    number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    assert tokenizer([word])[0, 1] == 6 + number % 5


def test_unknown_words_use_all_buckets():
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer([f"word{n}" for n in range(500)])[:, 1]
    assert ids.min() >= 6
    assert ids.max() < tokenizer.end
    assert len(ids.unique()) > 60


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("Tree",), {}, "one lower-case word"),
        (("two words",), {}, "one lower-case word"),
        (("tree", "tree"), {}, "a word occurs twice"),
        (("tree",), {"buckets": 0}, "at least 3 and 1"),
        (("tree",), {"context_length": 2}, "at least 3 and 1"),
    ],
)
def test_invalid_vocabularies_are_refused(words, options, message):
    with pytest.raises(ConfigError, match=message):
        WordTokenizer(words, **options)


def test_words_consist_of_letters_and_digits():
    assert split_words("Top-down view, 4x!") == ["top", "down", "view", "4x"]
