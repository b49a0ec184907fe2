from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from loraseg.config import build
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.regions import Regions
from tests.unit.tiny_diffusion import tiny_tokenizer

CITY = LabelSpace(("background", "road", "sidewalk", "traffic light", "sky", "Car"))
TOKENIZER = tiny_tokenizer()


def conditioner(label_space=CITY, tokenizers=(TOKENIZER,), **fields):
    return Conditioner(tokenizers, label_space, ConditioningConfig(**fields))


def stripes(*ids, size=12):
    """Return a mask with one stripe of columns per id, with different widths."""
    return np.repeat(np.array(ids, np.uint8), range(3, 3 + len(ids)))[None].repeat(size, 0)


def tokens_by_class(condition, tokenizer=TOKENIZER):
    """Return the token strings of the prompt by class id."""
    ids = tokenizer(
        condition.prompt, padding="max_length", max_length=77, truncation=True
    ).input_ids
    by_class = {}
    for token, index in zip(ids, condition.token_classes.tolist(), strict=True):
        by_class.setdefault(index, []).append(tokenizer.convert_ids_to_tokens(token))
    return by_class


def test_words_are_ordered_by_id_and_have_all_their_tokens():
    condition = conditioner()(stripes(5, 2, 4))
    assert condition.prompt == "sidewalk sky Car"
    assert condition.classes == (2, 4, 5)
    tokens = tokens_by_class(condition)
    assert tokens[2] == ["side", "walk</w>"]
    assert tokens[4] == ["sky</w>"]
    assert tokens[5] == ["car</w>"]
    assert tokens[-1][:2] == ["<|startoftext|>", "<|endoftext|>"]
    assert condition.token_classes.tolist()[:6] == [-1, 2, 2, 4, 5, -1]
    assert len(condition.token_classes) == 77


def test_tokens_of_a_class_name_of_two_words():
    tokens = tokens_by_class(conditioner()(stripes(3)))
    assert "".join(tokens[3]).replace("</w>", " ") == "traffic light "


def test_words_of_the_template_have_no_class():
    condition = conditioner(template="a photo of {classes}, in heavy fog")(stripes(1, 4))
    assert condition.prompt == "a photo of road sky, in heavy fog"
    tokens = tokens_by_class(condition)
    assert (tokens[1], tokens[4]) == (["road</w>"], ["sky</w>"])
    assert tokens[-1][:9] == [
        "<|startoftext|>",
        *(word + "</w>" for word in ("a", "photo", "of", ",", "in", "heavy", "fog")),
        "<|endoftext|>",
    ]


def test_words_replace_class_names():
    condition = conditioner(words={"car": "red   train"})(stripes(5))
    assert condition.prompt == "red train"
    assert tokens_by_class(condition)[5][-1] == "train</w>"


def test_ignored_pixels_get_the_nearest_class_but_stay_ignored_in_the_label():
    mask = stripes(1, 255, 4)
    condition = conditioner()(mask)
    np.testing.assert_array_equal(condition.label, mask)
    # Columns 3 and 4 are closer to class 1, columns 5 and 6 to class 4.
    np.testing.assert_array_equal(condition.regions[0], [1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4])


def test_background_has_a_word_only_if_configured():
    mask = stripes(0, 1)
    condition = conditioner()(mask)
    assert (condition.prompt, condition.classes) == ("road", (1,))
    np.testing.assert_array_equal(condition.regions, np.where(mask == 0, 255, 1))
    np.testing.assert_array_equal(condition.label, mask)
    named = conditioner(background_word="wall")(mask)
    assert (named.prompt, named.classes) == ("wall road", (0, 1))
    np.testing.assert_array_equal(named.regions, mask)


def test_a_mask_of_background_only_has_a_prompt_without_classes():
    condition = conditioner(template="a photo of {classes} in heavy fog")(stripes(0))
    assert condition.prompt == "a photo of in heavy fog"
    assert (condition.token_classes == -1).all()
    assert (condition.regions == 255).all()


def test_the_smallest_classes_are_dropped_from_a_long_prompt():
    # 75 tokens are free; each name has four tokens, so 18 of 30 fit.
    names = tuple("".join(letters) for letters in product("jqxz", repeat=4))[:30]
    make_condition = conditioner(LabelSpace(names))
    areas = np.random.default_rng(0).permutation(np.arange(30) // 2 + 4)
    mask = np.repeat(np.arange(30, dtype=np.uint8), areas)[None]
    mask = np.concatenate([mask, np.full((1, 5), 255, np.uint8)], axis=1)
    condition = make_condition(mask)
    # Of equal areas the larger id is dropped first.
    order = sorted(range(30), key=lambda i: (areas[i], -i))
    assert condition.dropped == tuple(sorted(order[:12]))
    assert condition.classes == tuple(sorted(order[12:]))
    assert condition.prompt == " ".join(names[i] for i in condition.classes)
    expected = np.where(np.isin(mask, condition.dropped), 255, mask)
    np.testing.assert_array_equal(condition.label, expected)
    last = 255 if 29 in condition.dropped else 29
    np.testing.assert_array_equal(condition.regions[0, :-5], expected[0, :-5])
    assert (condition.regions[0, -5:] == last).all()
    counts = np.bincount(condition.token_classes[condition.token_classes >= 0], minlength=30)
    assert all(counts[i] == (4 if i in condition.classes else 0) for i in range(30))


@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.sampled_from([0.0, 0.3, 0.95]),
    st.sampled_from(["nearest", "max"]),
)
@settings(max_examples=60, deadline=None)
def test_positions_attend_to_their_class_and_at_least_one_token(seed, count, shape, ignored, mode):
    generator = np.random.default_rng(seed)
    words = ("road", "sidewalk", "traffic light", "sky", "bicycle")
    names = tuple(f"{words[i % 5]} {i}" for i in range(count))
    mask = generator.integers(0, count, shape).astype(np.uint8)
    mask[generator.random(shape) < ignored] = 255
    mask[0, 0] = generator.integers(count)
    condition = conditioner(LabelSpace(names), downsampling=mode)(mask)
    seen = Regions.stack([condition]).mask(*shape)[0, 0].numpy()
    np.testing.assert_array_equal(
        seen,
        (condition.regions.reshape(-1, 1) == condition.token_classes)
        | (condition.token_classes == -1),
    )
    assert Regions.stack([condition]).mask(3, 2).any(dim=-1).all()
    kept = (mask != 255) & ~np.isin(mask, condition.dropped)
    np.testing.assert_array_equal(condition.regions[kept], mask[kept])
    np.testing.assert_array_equal(condition.label, np.where(kept, mask, 255))
    assert set(condition.classes) | set(condition.dropped) == {*np.unique(mask).tolist()} - {255}
    assert set(condition.token_classes.tolist()) == {-1, *condition.classes}


def test_two_hundred_classes_in_one_mask():
    condition = conditioner(LabelSpace(tuple(f"cat {i}" for i in range(200))))(
        np.arange(200, dtype=np.uint8).reshape(10, 20).repeat(2, 0)
    )
    # "cat 7" has two tokens, "cat 42" three, "cat 142" four; of equal areas the small ids stay.
    assert condition.classes == tuple(range(28))
    assert condition.dropped == tuple(range(28, 200))
    assert len(condition.prompt.split()) == 56


def test_the_tokenizers_of_sdxl_share_one_map():
    pair = (TOKENIZER, tiny_tokenizer(pad="!"))
    single, double = conditioner()(stripes(2, 4)), conditioner(tokenizers=pair)(stripes(2, 4))
    np.testing.assert_array_equal(single.token_classes, double.token_classes)
    letters = CLIPTokenizer(vocab=TOKENIZER.get_vocab(), merges=[], model_max_length=77)
    with pytest.raises(ConfigError, match=r"'road'\): the tokenizers give \[1, 4\] tokens for"):
        conditioner(tokenizers=(TOKENIZER, letters))


def test_tokenizers_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"\[32, 77\] tokens, expected one length"):
        conditioner(tokenizers=(TOKENIZER, tiny_tokenizer(length=32)))
    with pytest.raises(ConfigError, match="no tokenizer"):
        conditioner(tokenizers=())


def test_the_length_is_that_of_the_tokenizer():
    condition = conditioner(tokenizers=(tiny_tokenizer(length=32),))(stripes(1))
    assert condition.token_classes.tolist() == [-1, 1, *[-1] * 30]


def test_a_word_with_other_tokens_in_the_template_is_refused():
    make_condition = conditioner(template="{classes}s at night")
    with pytest.raises(ConfigError, match="'roads at night': its words have other tokens"):
        make_condition(stripes(1))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (np.zeros((0, 4), np.uint8), r"m\.png: got uint8 \(0, 4\), expected uint8 \(h, w\)"),
        (np.zeros((4, 4), np.int64), r"m\.png: got int64 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), r"m\.png: got uint8 \(4, 4, 3\)"),
        (np.full((4, 4), 255, np.uint8), r"m\.png: every pixel is ignored"),
        (stripes(1, 6, 200), r"m\.png: got class ids \[6, 200\], expected 0 to 5 or 255"),
    ],
)
def test_invalid_masks_are_refused(mask, match):
    with pytest.raises(DatasetError, match=match):
        conditioner()(mask, where="m.png")


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("  ", r"class 5 \('Car'\): its word '' has 0 tokens, expected 1 to 75"),
        ("qz" * 40, r"class 5 \('Car'\): .* has 80 tokens, expected 1 to 75"),
        ("<|endoftext|>", r"class 5 \('Car'\): '<\|endoftext\|>' contains the token"),
    ],
)
def test_invalid_words_are_refused(word, match):
    with pytest.raises(DatasetError, match=match):
        conditioner(words={"Car": word})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"template": "a photo"}, "'a photo': expected text with {classes} exactly once"),
        ({"template": "{classes} {classes}"}, "exactly once"),
        ({"template": "{classes} {weather}"}, "no other braces"),
        ({"downsampling": "mean"}, "downsampling: Input should be 'nearest' or 'max'"),
    ],
)
def test_invalid_settings_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        build(ConditioningConfig, fields)


def test_settings_that_do_not_fit_the_classes_are_refused():
    with pytest.raises(ConfigError, match="no class 'carr'; did you mean 'Car'"):
        conditioner(words={"carr": "car"})
    with pytest.raises(ConfigError, match="leaves -1 of 75 tokens"):
        conditioner(template="road " * 76 + "{classes}")


def test_settings_are_built_from_plain_values():
    config = build(ConditioningConfig, {"words": {"earth": "ground"}, "downsampling": "max"})
    assert config.words == {"earth": "ground"}
    condition = Conditioner((TOKENIZER,), LabelSpace(("earth",)), config)(stripes(0))
    assert (condition.prompt, condition.downsampling) == ("ground", "max")
