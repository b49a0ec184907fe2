"""Prediction against CAT-Seg's inference written out on the naive model, and the text cache."""

import numpy as np
import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.errors import AdapterMismatchError, ConfigError, DatasetError
from loraseg.fuse.mix import fuse
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.sliding_window import SlidingWindowGrid
from tests.unit.segment.open_vocabulary.catseg import naive_catseg
from tests.unit.segment.open_vocabulary.catseg.official_layout import Sizes, random_state

WORDS = WordTokenizer(["photo", "of", "scene", "road", "sky"], context_length=9, buckets=12)
SIZES = Sizes(vocabulary=WORDS.vocab_size, context=9)
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
CLASSES = ["road", "sky", "car"]
TEXT_MLP = "sem_seg_head.predictor.clip_model.transformer.resblocks.1.mlp.c_fc"
IMAGE_MLP = "sem_seg_head.predictor.clip_model.visual.transformer.resblocks.1.mlp.c_fc"


@pytest.fixture(scope="module")
def state():
    return {key: value.float() for key, value in random_state(SIZES).items()}


def make_base(state, sizes=SIZES, **fields):
    model = load_official_checkpoint(state, vision_heads=2, text_heads=2, heads=2, pad_len=6)
    values = {"prompt": "photo of {}", "mean": MEAN, "std": STD, "pad_multiple": 1, "window": 18}
    return SegmentationBase(
        name="tiny", digest="0" * 64, model=model, tokenizer=WORDS, **{**values, **fields}
    )


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mix(module=TEXT_MLP, size=1.0, name="a"):
    generator = torch.Generator().manual_seed(3)
    columns = SIZES.text_width if module == TEXT_MLP else SIZES.width
    down, up = (
        torch.randn(shape, generator=generator) for shape in ((2, columns), (4 * columns, 2))
    )
    return fuse([Adapter(name=name, pairs={module: LoraPair(down, up, size)}, digest=name)], [1.0])


def naive_logits(state, pixels, classes):
    """Return the logits of a float image (3, h, w) of 0 to 255, resized to CLIP's input."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    side = SIZES.grid * SIZES.patch
    window = naive_catseg.resize((pixels - mean) / std, side, side, "linear")
    ids = WORDS([f"photo of {name}" for name in classes])
    text = naive_catseg.encode_text(state, ids, 2)[:, None]
    return naive_catseg.forward(
        state,
        window[None],
        text,
        clip_heads=2,
        heads=2,
        window=2,
        pad_len=6,
        pool=1,
        guidance_blocks=(0, 1),
    )[0]


def planes(picture):
    return torch.tensor(picture.transpose(2, 0, 1), dtype=torch.float32)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 50), (40, 20)])
def test_plain_without_padding(state, height, width):
    picture = image(height, width)
    expected = torch.sigmoid(naive_logits(state, planes(picture), CLASSES))
    expected = naive_catseg.resize(expected, height, width, "linear")
    (got,) = Predictor(make_base(state)).predict([picture], CLASSES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(37, 50), (64, 32), (10, 12)])
def test_plain_with_the_official_padding(state, height, width):
    # Pad with the mean colour to multiples of 32, resize, crop the map to [:h, :w].
    picture = image(height, width)
    high, wide = -(-height // 32) * 32, -(-width // 32) * 32
    padded = torch.tensor(MEAN)[:, None, None].repeat(1, high, wide)
    padded[:, :height, :width] = planes(picture)
    expected = torch.sigmoid(naive_logits(state, padded, CLASSES))[:, :height, :width]
    expected = naive_catseg.resize(expected, height, width, "linear")
    (got,) = Predictor(make_base(state, pad_multiple=32)).predict([picture], CLASSES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_sliding(state):
    # Scaled down from 384 and 640: window 18, stride int(18 * .667) = 12, canvas 30.
    picture = image(23, 41)
    canvas = naive_catseg.resize(planes(picture), 30, 30, "linear")
    total, count = torch.zeros(3, 30, 30), torch.zeros(30, 30)
    for top in (0, 12):
        for left in (0, 12):
            logits = naive_logits(state, canvas[:, top : top + 18, left : left + 18], CLASSES)
            scores = torch.sigmoid(naive_catseg.resize(logits, 18, 18, "linear"))
            for r in range(18):
                for c in range(18):
                    total[:, top + r, left + c] += scores[:, r, c]
                    count[top + r, left + c] += 1
    whole = naive_logits(state, naive_catseg.resize(planes(picture), 18, 18, "linear"), CLASSES)
    whole = torch.sigmoid(naive_catseg.resize(whole, 18, 18, "linear"))
    mean = (total / count + naive_catseg.resize(whole, 30, 30, "linear")) / 2
    expected = naive_catseg.resize(mean, 23, 41, "linear")
    (got,) = Predictor(make_base(state), mode="sliding").predict([picture], CLASSES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_official_numbers_of_sliding():
    tiling = SlidingWindowGrid(384)
    assert (tiling.stride, tiling.canvas) == (256, 640)
    assert tiling.corners == ((0, 0), (0, 256), (256, 0), (256, 256))


@pytest.mark.parametrize("mode", ["plain", "sliding"])
@pytest.mark.parametrize("windows_per_batch", [3, 64])
def test_windows_of_all_images_share_batches(state, mode, windows_per_batch):
    base = make_base(state)
    batches = []
    base.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    pictures = [image(20, 30, 1), image(16, 16, 2), image(33, 9, 3)]
    predictor = Predictor(base, mode=mode, windows_per_batch=windows_per_batch)
    together = predictor.predict(pictures, CLASSES)
    assert sum(batches) == (3 if mode == "plain" else 15)
    assert len(batches) == -(-sum(batches) // windows_per_batch)
    for picture, scores in zip(pictures, together, strict=True):
        (alone,) = predictor.predict([picture], CLASSES)
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)
        assert scores.shape == (3, *picture.shape[:2])
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1


def test_a_mix_changes_text_and_image_features_and_is_removed(state):
    predictor = Predictor(make_base(state))
    picture = image(16, 16)
    (before,) = predictor.predict([picture], CLASSES)
    changed = [
        predictor.predict([picture], CLASSES, mix(module, name=module))[0]
        for module in (TEXT_MLP, IMAGE_MLP)
    ]
    (after,) = predictor.predict([picture], CLASSES)
    assert all(float((scores - before).abs().max()) > 1e-3 for scores in changed)
    assert torch.equal(before, after)


@pytest.mark.parametrize("mode", ["plain", "sliding"])
@pytest.mark.parametrize("windows_per_batch", [3, 64])
def test_every_image_of_a_batch_has_its_own_mix(state, mode, windows_per_batch):
    text, picture = mix(TEXT_MLP, name="t"), mix(IMAGE_MLP, name="i")
    mixes = [text, None, picture, text, picture, None]
    pictures = [image(20 + 3 * index, 30, index) for index in range(6)]
    predictor = Predictor(make_base(state), mode=mode, windows_per_batch=windows_per_batch)
    together = predictor.predict(pictures, CLASSES, mixes)
    for single, used, scores in zip(pictures, mixes, together, strict=True):
        (alone,) = Predictor(make_base(state), mode=mode).predict([single], CLASSES, used)
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)


def test_more_mixes_than_fit_one_batch(state):
    pictures = [image(16, 16, index) for index in range(20)]
    mixes = [mix(IMAGE_MLP, size=1.0 + index, name=str(index)) for index in range(20)]
    together = Predictor(make_base(state)).predict(pictures, CLASSES, mixes)
    for single, used, scores in zip(pictures, mixes, together, strict=True):
        (alone,) = Predictor(make_base(state)).predict([single], CLASSES, used)
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)


def test_the_number_of_mixes_must_be_that_of_images(state):
    with pytest.raises(AdapterMismatchError, match="got 1 for 2 images"):
        Predictor(make_base(state)).predict([image(16, 16)] * 2, CLASSES, [mix()])


def test_bfloat16_scores_are_float32_and_close(state):
    picture, exact = image(20, 30), make_base(state)
    rough = make_base(state)
    rough.model.to(torch.bfloat16)
    (expected,) = Predictor(exact).predict([picture], CLASSES, mix(IMAGE_MLP))
    (got,) = Predictor(rough).predict([picture], CLASSES, mix(IMAGE_MLP))
    assert got.dtype == torch.float32
    # 8 bits of mantissa through a dozen layers.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
    assert float((got - expected).abs().mean()) < 0.02


def test_text_features_are_cached_by_class_list_and_mix(state):
    base = make_base(state)
    calls = []
    encode = base.model.encode_text
    base.model.encode_text = lambda ids, groups: calls.append(len(ids)) or encode(ids, groups)
    predictor = Predictor(base)
    picture = image(16, 16)
    for classes in (CLASSES, CLASSES[:2]):
        for used in (None, mix(), None, mix()):
            predictor.predict([picture], classes, used)
    assert calls == [3, 3, 2, 2]


def test_first_image_keeps_the_text_of_the_first_mix(state):
    # As in SemLA's code, all images use the text features of the first image's adapters.
    picture = image(16, 16)
    stale = Predictor(make_base(state), text_cache="first_image")
    fresh = Predictor(make_base(state))
    first = stale.predict([picture], CLASSES, mix(size=1.0, name="a"))[0]
    second = stale.predict([picture], CLASSES, mix(size=5.0, name="b"))[0]
    assert torch.equal(first, second)
    assert torch.equal(first, fresh.predict([picture], CLASSES, mix(size=1.0, name="a"))[0])
    assert not torch.equal(second, fresh.predict([picture], CLASSES, mix(size=5.0, name="b"))[0])


def test_only_the_first_synonym_is_used(state):
    predictor = Predictor(make_base(state))
    picture = image(16, 16)
    (plain,) = predictor.predict([picture], ["road", "sky"])
    (synonyms,) = predictor.predict([picture], ["road, street", "sky"])
    assert torch.equal(plain, synonyms)


def test_several_prompts(state):
    sizes = Sizes(vocabulary=WORDS.vocab_size, context=9, prompts=2)
    values = {key: value.float() for key, value in random_state(sizes).items()}
    base = make_base(values, more_prompts=("scene of {}",))
    assert base.encode_classes(CLASSES).shape == (3, 2, SIZES.embed)
    assert Predictor(base).predict([image(16, 16)], CLASSES)[0].shape == (3, 16, 16)
    with pytest.raises(ConfigError, match=r"expected 2 template"):
        make_base(values)


def test_read_only_and_strided_images_and_the_training_mode(state):
    base = make_base(state)
    base.model.train()
    picture = image(16, 16)
    picture.setflags(write=False)
    predictor = Predictor(base)
    (plain,) = predictor.predict([picture], CLASSES)
    (flipped,) = predictor.predict([picture[:, ::-1][:, ::-1]], CLASSES)
    assert torch.equal(plain, flipped)
    assert base.model.training
    assert predictor.predict([], CLASSES) == []


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one name"),
        ("road", "expected a list"),
        (["road", "sky", "road"], r"doubled \['road'\]"),
        (["road", " "], "blank 1"),
        (["road", ", street"], "blank 1"),
    ],
)
def test_class_lists_are_checked(state, classes, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(make_base(state)).predict([image(16, 16)], classes)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_images_are_checked(state, picture):
    with pytest.raises(DatasetError, match="image 1: got"):
        Predictor(make_base(state)).predict([image(4, 4), picture], CLASSES)


def test_a_mix_of_another_model_is_refused(state):
    nowhere = {"nowhere": LoraPair(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    wrong = fuse([Adapter(name="a", pairs=nowhere, digest="a")], [1.0])
    with pytest.raises(AdapterMismatchError, match="nowhere"):
        Predictor(make_base(state)).predict([image(16, 16)], CLASSES, wrong)


def test_adapters_have_no_effect_on_inert_attention(state):
    module = TEXT_MLP.replace("mlp.c_fc", "attn.v_proj")
    down, up = torch.ones(1, SIZES.text_width), torch.ones(SIZES.text_width, 1)
    clip_mix = fuse([Adapter(name="a", pairs={module: LoraPair(down, up, 1.0)}, digest="a")], [1.0])
    settings = {"vision_heads": 2, "text_heads": 2, "heads": 2, "pad_len": 6}
    features = {}
    for kind in ("active", "inert"):
        model = load_official_checkpoint(state, clip_attention_lora=kind, **settings)
        base = SegmentationBase(name="", digest="", model=model, tokenizer=WORDS)
        predictor = Predictor(base)
        (plain,) = predictor.predict([image(16, 16)], CLASSES)
        (mixed,) = predictor.predict([image(16, 16)], CLASSES, clip_mix)
        features[kind] = plain, mixed
    assert torch.equal(*features["inert"])
    assert not torch.equal(*features["active"])
    assert torch.equal(features["inert"][0], features["active"][0])
