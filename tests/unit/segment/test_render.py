import io

import numpy as np
import pytest
from PIL import Image

from loraseg.data.drawing import colorize, encode_png
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.errors import DatasetError
from loraseg.segment.render import (
    grey_png,
    overlay,
    overlay_with_legend,
)

SPACE = LabelSpace(("road", "sky", "a class with a rather long name"))


@pytest.fixture
def labels():
    return np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (20, 30))


@pytest.fixture
def image():
    return np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def decoded(data):
    return Image.open(io.BytesIO(data))


def test_label_png_keeps_ids_and_has_the_class_colours(labels):
    picture = decoded(encode_mask(labels, SPACE))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), labels)
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colorize(labels, SPACE))


def test_label_png_refuses_unknown_ids(labels):
    with pytest.raises(DatasetError, match=r"ids \[2\] outside the class list"):
        encode_mask(labels, LabelSpace(("road", "sky")))


def test_png_is_lossless(image):
    np.testing.assert_array_equal(np.asarray(decoded(encode_png(image))), image)


def test_grey_png_has_255_levels_and_rounds_half_to_even():
    levels = np.arange(256)
    picture = decoded(grey_png(np.stack([levels / 255, np.full(256, 0.5)])))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), [levels, np.full(256, 128)])


def test_grey_png_of_float32_is_within_half_a_level():
    values = np.random.default_rng(0).random((30, 40), dtype=np.float32)
    shown = np.asarray(decoded(grey_png(values))).astype(np.float64)
    assert np.abs(shown - 255 * values.astype(np.float64)).max() <= 0.5


@pytest.mark.parametrize("wrong", [-0.1, 1.01, np.nan])
def test_grey_png_refuses_values_outside_zero_to_one(wrong):
    with pytest.raises(DatasetError, match="expected 0 to 1"):
        grey_png(np.array([[0.5, wrong]], np.float32))


def test_overlay_blends_pixel_by_pixel(image, labels):
    blended = overlay(image, labels, SPACE, opacity=0.25)
    for pixel in np.ndindex(labels.shape):
        expected = image[pixel].astype(float)
        if labels[pixel] != 255:
            expected = 0.75 * expected + 0.25 * SPACE.palette[labels[pixel]]
        assert np.abs(blended[pixel] - expected).max() <= 0.5 + 1e-4


def test_overlay_with_opacity_zero_and_one(image, labels):
    np.testing.assert_array_equal(overlay(image, labels, SPACE, opacity=0.0), image)
    full = overlay(image, labels, SPACE, opacity=1.0)
    shown = labels != 255
    np.testing.assert_array_equal(full[shown], colorize(labels, SPACE)[shown])
    np.testing.assert_array_equal(full[~shown], image[~shown])


def test_overlay_refuses_another_size(image, labels):
    with pytest.raises(DatasetError, match=r"label map \(19, 30\) over an image of \(20, 30\)"):
        overlay(image, labels[1:], SPACE)


@pytest.mark.parametrize("width", [30, 90, 400])
def test_legend_is_below_and_shows_each_present_class_once(width):
    labels = np.zeros((20, width), np.uint8)
    labels[:, : width // 3] = 2
    image = np.full((20, width, 3), 128, np.uint8)
    picture = overlay_with_legend(image, labels, SPACE)
    np.testing.assert_array_equal(picture[:20, :width], overlay(image, labels, SPACE))
    legend = picture[20:]
    assert len(legend) >= 22
    swatch = 11 * 11  # inside the outline
    counts = [(legend == SPACE.palette[index]).all(axis=2).sum() for index in range(3)]
    assert counts[0] >= swatch
    assert counts[1] == 0
    assert counts[2] >= swatch


def test_legend_of_an_empty_map_is_empty(image):
    labels = np.full((20, 30), 255, np.uint8)
    np.testing.assert_array_equal(overlay_with_legend(image, labels, SPACE), image)


def test_equal_inputs_give_equal_bytes(image, labels):
    first, second = (encode_png(overlay_with_legend(image, labels, SPACE)) for _ in range(2))
    assert first == second
