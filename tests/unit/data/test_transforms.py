import colorsys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from loraseg.data.labels import IGNORE
from loraseg.data.transforms import (
    AugmentConfig,
    Jitter,
    augment,
    crop,
    draw_jitter,
    flip,
    jitter_colors,
    pad,
    resize,
    resize_shortest_edge,
    shift_hue,
)
from loraseg.errors import ConfigError

STILL = AugmentConfig(crop=32, shortest_edge=(), flip=0.0, jitter=False)


def picture(height=40, width=56, seed=0):
    """An image whose red channel is the class id times 20, and the mask of these ids."""
    generator = np.random.default_rng(seed)
    mask = np.kron(generator.integers(0, 6, (height // 8, width // 8)), np.ones((8, 8)))
    mask = mask.astype(np.uint8)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[..., 0] = mask * 20
    return image, mask


def jitter(image, **strengths):
    return jitter_colors(image, Jitter(**strengths))


def test_nothing_to_do_is_the_identity():
    image, mask = picture(32, 32)
    same_image, same_mask = augment(image, mask, STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_mask, mask)
    np.testing.assert_array_equal(jitter(image), image)
    np.testing.assert_array_equal(resize(image, mask, (32, 32))[0], image)


@pytest.mark.parametrize("seed", range(20))
def test_image_and_mask_move_alike(seed):
    """Without resize and jitter the red channel still codes the ids, but where it was padded."""
    config = AugmentConfig(crop=48, shortest_edge=(), flip=0.5, jitter=False)
    image, mask = augment(*picture(), config, np.random.default_rng(seed))
    assert image.shape == (48, 48, 3)
    assert image.flags["C_CONTIGUOUS"]
    inside = mask != IGNORE
    np.testing.assert_array_equal(image[..., 0][inside], mask[inside] * 20)
    assert (image[~inside] == 128).all()
    assert inside.sum() == 40 * 48  # 40 rows of the image, all columns of the crop


@pytest.mark.parametrize("edge", [24, 57, 80])
def test_resize_keeps_image_and_mask_aligned(edge):
    """Half a block away from borders the enlarged red channel codes the enlarged ids exactly."""
    image, mask = resize_shortest_edge(*picture(64, 96), edge)
    assert min(mask.shape) == edge
    assert mask.shape[1] == pytest.approx(mask.shape[0] * 1.5, abs=1)
    from_image = np.rint(image[..., 0] / 20).astype(int)
    block = edge / 64 * 8
    rows = ((np.arange(8) + 0.5) * block).astype(int)
    columns = ((np.arange(12) + 0.5) * block).astype(int)
    np.testing.assert_array_equal(from_image[np.ix_(rows, columns)], mask[np.ix_(rows, columns)])


def test_mask_resize_invents_no_class():
    image, mask = picture()
    mask[mask == 3] = IGNORE
    small = resize(image, mask, (17, 23))[1]
    assert small.shape == (17, 23)
    assert set(np.unique(small)) <= set(np.unique(mask))


def test_mask_resize_takes_the_nearest_centre():
    image, mask = picture()
    small = resize(image, mask, (13, 21))[1]
    rows = np.floor((np.arange(13) + 0.5) * 40 / 13).astype(int)
    columns = np.floor((np.arange(21) + 0.5) * 56 / 21).astype(int)
    np.testing.assert_array_equal(small, mask[np.ix_(rows, columns)])


def test_flip_twice_and_crop_are_exact():
    image, mask = picture()
    for before, after in zip((image, mask), flip(*flip(image, mask)), strict=True):
        np.testing.assert_array_equal(before, after)
    part_image, part_mask = crop(image, mask, 5, 7, 16)
    np.testing.assert_array_equal(part_image, image[5:21, 7:23])
    np.testing.assert_array_equal(part_mask, mask[5:21, 7:23])


def test_padding_is_below_and_right():
    image, mask = picture(16, 24)
    padded_image, padded_mask = pad(image, mask, 32)
    np.testing.assert_array_equal(padded_image[:16, :24], image)
    assert (padded_image[16:] == 128).all()
    assert (padded_image[:, 24:] == 128).all()
    assert (padded_mask[16:] == IGNORE).all()
    assert (padded_mask[:, 24:] == IGNORE).all()
    assert pad(image, mask, 8)[1].shape == (16, 24)


def test_brightness_and_contrast_are_affine_and_clipped():
    image, _ = picture()
    np.testing.assert_array_equal(
        jitter(image, brightness=20.0), np.minimum(image.astype(int) + 20, 255)
    )
    np.testing.assert_array_equal(
        jitter(image, contrast=1.5), np.minimum(np.rint(image * 1.5), 255)
    )
    first = jitter(image, brightness=-30.0, contrast=0.5, contrast_first=True)
    last = jitter(image, brightness=-30.0, contrast=0.5, contrast_first=False)
    np.testing.assert_array_equal(first, last)  # nothing lies between the two without colour steps


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.5])
def test_saturation_equals_colorsys(factor):
    image = picture(8, 8)[0]
    expected = np.empty(image.shape)
    for place in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) for c in image[place]))
        expected[place] = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1.0), value)
    assert np.abs(jitter(image, saturation=factor) - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("degrees", [-36.0, 7.0, 120.0])
def test_hue_equals_colorsys(degrees):
    levels = picture(8, 8)[0].astype(np.float32)
    levels[0, 0], levels[0, 1] = 0.0, 77.0  # black and grey have no hue
    turned = shift_hue(levels, degrees)
    for place in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) for c in levels[place]))
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1.0, saturation, value)
        assert np.abs(turned[place] - expected).max() < 1e-2


def test_full_turn_and_grey_pictures_keep_their_colours():
    levels = picture()[0].astype(np.float32)
    np.testing.assert_allclose(shift_hue(levels, 360.0), levels, atol=1e-2)
    grey = np.full((4, 4, 3), 90, dtype=np.uint8)
    np.testing.assert_array_equal(jitter(grey, saturation=1.5, hue_degrees=30.0), grey)


def test_a_generator_state_fixes_the_result():
    config = AugmentConfig(crop=24, shortest_edge=(24, 32, 40))
    results = [augment(*picture(), config, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (results[0][0] != results[2][0]).any()


def test_all_draws_occur():
    image, mask = picture()
    config = AugmentConfig(crop=32, shortest_edge=(), flip=0.5, jitter=True)
    images = [augment(image, mask, config, np.random.default_rng(seed))[0] for seed in range(40)]
    assert all((one != other).any() for one, other in pairwise(images))
    assert all(one.dtype == np.uint8 and one.shape == (32, 32, 3) for one in images)


def test_resize_agrees_with_pillow_called_directly():
    image, mask = picture()
    expected = Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(image, mask, (20, 30))[0], np.asarray(expected))


def test_jitter_is_drawn_in_the_ranges_of_ssd():
    """4000 draws: each step is taken about half the time and fills its range."""
    generator = np.random.default_rng(0)
    drawn = [draw_jitter(generator) for _ in range(4000)]
    ranges = {
        "brightness": (0.0, -32, 32),
        "contrast": (1.0, 0.5, 1.5),
        "saturation": (1.0, 0.5, 1.5),
        "hue_degrees": (0.0, -36, 36),
    }
    for name, (still, low, high) in ranges.items():
        values = np.array([getattr(one, name) for one in drawn])
        moved = values[values != still]
        assert 0.47 < len(moved) / len(values) < 0.53
        assert low <= moved.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < moved.max() <= high
        assert abs(moved.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert 0.47 < np.mean([one.contrast_first for one in drawn]) < 0.53


def test_config_refuses_impossible_values():
    with pytest.raises(ConfigError, match="crop 0"):
        AugmentConfig(crop=0)
    with pytest.raises(ConfigError, match=r"flip 1\.5: expected a probability"):
        AugmentConfig(flip=1.5)
