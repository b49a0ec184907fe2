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
    """A mask with one column stripe per id, each of its own width."""
    return np.repeat(np.array(ids, np.uint8), range(3, 3 + len(ids)))[None].repeat(size, 0)


def class_words_of(condition, tokenizer=TOKENIZER):
    """Token strings by class id, read from the prompt's own tokens."""
    ids = tokenizer(
        condition.prompt, padding="max_length", max_length=77, truncation=True
    ).input_ids
    by_class = {}
    for token, index in zip(ids, condition.token_classes.tolist(), strict=True):
        by_class.setdefault(index, []).append(tokenizer.convert_ids_to_tokens(token))
    return by_class


def test_words_stand_by_rising_id_and_all_their_tokens_are_theirs():
    made = conditioner()(stripes(5, 2, 4))
    assert made.prompt == "sidewalk sky Car"
    assert made.classes == (2, 4, 5)
    found = class_words_of(made)
    assert found[2] == ["side", "walk</w>"]
    assert found[4] == ["sky</w>"]
    assert found[5] == ["car</w>"]
    assert found[-1][:2] == ["<|startoftext|>", "<|endoftext|>"]
    assert made.token_classes.tolist()[:6] == [-1, 2, 2, 4, 5, -1]
    assert len(made.token_classes) == 77


def test_tokens_of_a_name_of_two_words():
    found = class_words_of(conditioner()(stripes(3)))
    assert "".join(found[3]).replace("</w>", " ") == "traffic light "


def test_words_of_the_template_belong_to_no_class():
    made = conditioner(template="a photo of {classes}, in heavy fog")(stripes(1, 4))
    assert made.prompt == "a photo of road sky, in heavy fog"
    found = class_words_of(made)
    assert (found[1], found[4]) == (["road</w>"], ["sky</w>"])
    assert found[-1][:9] == [
        "<|startoftext|>",
        *(word + "</w>" for word in ("a", "photo", "of", ",", "in", "heavy", "fog")),
        "<|endoftext|>",
    ]


def test_other_words_for_a_class():
    made = conditioner(words={"car": "red   train"})(stripes(5))
    assert made.prompt == "red train"
    assert class_words_of(made)[5][-1] == "train</w>"


def test_ignored_pixels_take_the_nearest_class_but_stay_ignored_in_the_label():
    mask = stripes(1, 255, 4)
    made = conditioner()(mask)
    np.testing.assert_array_equal(made.label, mask)
    # Columns 3 and 4 are nearer to class 1, columns 5 and 6 to class 4.
    np.testing.assert_array_equal(made.regions[0], [1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4])


def test_background_has_no_word_unless_it_is_given_one():
    mask = stripes(0, 1)
    made = conditioner()(mask)
    assert (made.prompt, made.classes) == ("road", (1,))
    np.testing.assert_array_equal(made.regions, np.where(mask == 0, 255, 1))
    np.testing.assert_array_equal(made.label, mask)
    named = conditioner(background_word="wall")(mask)
    assert (named.prompt, named.classes) == ("wall road", (0, 1))
    np.testing.assert_array_equal(named.regions, mask)


def test_nothing_but_background_gives_a_prompt_without_classes():
    made = conditioner(template="a photo of {classes} in heavy fog")(stripes(0))
    assert made.prompt == "a photo of in heavy fog"
    assert (made.token_classes == -1).all()
    assert (made.regions == 255).all()


def test_too_many_names_leave_out_the_smallest_classes():
    # 75 tokens of room; each name spells four tokens, so 18 of 30 fit.
    names = tuple("".join(letters) for letters in product("jqxz", repeat=4))[:30]
    maker = conditioner(LabelSpace(names))
    areas = np.random.default_rng(0).permutation(np.arange(30) // 2 + 4)
    mask = np.repeat(np.arange(30, dtype=np.uint8), areas)[None]
    mask = np.concatenate([mask, np.full((1, 5), 255, np.uint8)], axis=1)
    made = maker(mask)
    # Of equal areas the larger id goes first.
    order = sorted(range(30), key=lambda i: (areas[i], -i))
    assert made.dropped == tuple(sorted(order[:12]))
    assert made.classes == tuple(sorted(order[12:]))
    assert made.prompt == " ".join(names[i] for i in made.classes)
    expected = np.where(np.isin(mask, made.dropped), 255, mask)
    np.testing.assert_array_equal(made.label, expected)
    last = 255 if 29 in made.dropped else 29
    np.testing.assert_array_equal(made.regions[0, :-5], expected[0, :-5])
    assert (made.regions[0, -5:] == last).all()
    counts = np.bincount(made.token_classes[made.token_classes >= 0], minlength=30)
    assert all(counts[i] == (4 if i in made.classes else 0) for i in range(30))


@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.sampled_from([0.0, 0.3, 0.95]),
    st.sampled_from(["nearest", "max"]),
)
@settings(max_examples=60, deadline=None)
def test_every_place_sees_its_own_class_and_is_never_blind(seed, count, shape, ignored, way):
    generator = np.random.default_rng(seed)
    words = ("road", "sidewalk", "traffic light", "sky", "bicycle")
    names = tuple(f"{words[i % 5]} {i}" for i in range(count))
    mask = generator.integers(0, count, shape).astype(np.uint8)
    mask[generator.random(shape) < ignored] = 255
    mask[0, 0] = generator.integers(count)
    made = conditioner(LabelSpace(names), downsampling=way)(mask)
    seen = Regions.stack([made]).mask(*shape)[0, 0].numpy()
    np.testing.assert_array_equal(
        seen, (made.regions.reshape(-1, 1) == made.token_classes) | (made.token_classes == -1)
    )
    assert Regions.stack([made]).mask(3, 2).any(dim=-1).all()
    kept = (mask != 255) & ~np.isin(mask, made.dropped)
    np.testing.assert_array_equal(made.regions[kept], mask[kept])
    np.testing.assert_array_equal(made.label, np.where(kept, mask, 255))
    assert set(made.classes) | set(made.dropped) == {*np.unique(mask).tolist()} - {255}
    assert set(made.token_classes.tolist()) == {-1, *made.classes}


def test_two_hundred_classes_in_one_mask():
    made = conditioner(LabelSpace(tuple(f"cat {i}" for i in range(200))))(
        np.arange(200, dtype=np.uint8).reshape(10, 20).repeat(2, 0)
    )
    # "cat 7" makes two tokens, "cat 42" three, "cat 142" four: equal areas, the small ids stay.
    assert made.classes == tuple(range(28))
    assert made.dropped == tuple(range(28, 200))
    assert len(made.prompt.split()) == 56


def test_the_tokenizers_of_sdxl_share_one_map():
    pair = (TOKENIZER, tiny_tokenizer(pad="!"))
    one, two = conditioner()(stripes(2, 4)), conditioner(tokenizers=pair)(stripes(2, 4))
    np.testing.assert_array_equal(one.token_classes, two.token_classes)
    letters = CLIPTokenizer(vocab=TOKENIZER.get_vocab(), merges=[], model_max_length=77)
    with pytest.raises(ConfigError, match=r"'road'\): the tokenizers make \[1, 4\] tokens of"):
        conditioner(tokenizers=(TOKENIZER, letters))


def test_tokenizers_of_other_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"\[32, 77\] tokens, expected one length"):
        conditioner(tokenizers=(TOKENIZER, tiny_tokenizer(length=32)))
    with pytest.raises(ConfigError, match="no tokenizer"):
        conditioner(tokenizers=())


def test_a_length_of_its_own():
    made = conditioner(tokenizers=(tiny_tokenizer(length=32),))(stripes(1))
    assert made.token_classes.tolist() == [-1, 1, *[-1] * 30]


def test_a_word_that_reads_differently_in_the_template():
    maker = conditioner(template="{classes}s at night")
    with pytest.raises(ConfigError, match="'roads at night': its words make other tokens"):
        maker(stripes(1))


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
def test_masks_that_are_refused(mask, match):
    with pytest.raises(DatasetError, match=match):
        conditioner()(mask, where="m.png")


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("  ", r"class 5 \('Car'\): its word '' makes 0 tokens, expected 1 to 75"),
        ("qz" * 40, r"class 5 \('Car'\): .* makes 80 tokens, expected 1 to 75"),
        ("<|endoftext|>", r"class 5 \('Car'\): '<\|endoftext\|>' makes the token"),
    ],
)
def test_words_that_cannot_be_told(word, match):
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
def test_settings_that_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        build(ConditioningConfig, fields)


def test_settings_that_do_not_fit_the_classes():
    with pytest.raises(ConfigError, match="no class 'carr'; did you mean 'Car'"):
        conditioner(words={"carr": "car"})
    with pytest.raises(ConfigError, match="leaves -1 of 75 tokens"):
        conditioner(template="road " * 76 + "{classes}")


def test_settings_come_from_plain_values():
    config = build(ConditioningConfig, {"words": {"earth": "ground"}, "downsampling": "max"})
    assert config.words == {"earth": "ground"}
    made = Conditioner((TOKENIZER,), LabelSpace(("earth",)), config)(stripes(0))
    assert (made.prompt, made.downsampling) == ("ground", "max")
