import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from loraseg.synth.nearest_fill import fill_ignored


def random_mask(seed, shape, ignored):
    generator = np.random.default_rng(seed)
    mask = generator.integers(0, 5, shape).astype(np.uint8)
    mask[generator.random(shape) < ignored] = 255
    return mask


@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.1, 0.5, 0.9, 0.98]),
)
def test_fills_with_the_smallest_class_of_the_nearest_pixels(seed, height, width, ignored):
    mask = random_mask(seed, (height, width), ignored)
    labelled = np.argwhere(mask != 255)
    expected = mask.copy()
    if len(labelled):
        for hole in np.argwhere(mask == 255):
            distance = ((labelled - hole) ** 2).sum(axis=1)
            nearest = labelled[distance == distance.min()]
            expected[tuple(hole)] = min(mask[tuple(pixel)] for pixel in nearest)
    np.testing.assert_array_equal(fill_ignored(mask), expected)


@pytest.mark.parametrize("ignored", [0.05, 0.6, 0.999])
def test_filled_classes_agree_with_scipy_distances(ignored):
    mask = random_mask(1, (97, 150), ignored)
    mask[20:60, 10:90] = 255
    before = mask.copy()
    filled = fill_ignored(mask)
    np.testing.assert_array_equal(mask, before)
    np.testing.assert_array_equal(filled[mask != 255], mask[mask != 255])
    # A pixel filled with class c is as far from the nearest pixel of c as from any label.
    any_label = distance_transform_edt(mask == 255)
    for index in range(5):
        to_class = distance_transform_edt(mask != index)
        np.testing.assert_array_equal(to_class[filled == index], any_label[filled == index])


def test_masks_without_holes_or_labels_are_unchanged():
    whole = random_mask(0, (5, 7), 0.0)
    np.testing.assert_array_equal(fill_ignored(whole), whole)
    blank = np.full((3, 4), 255, np.uint8)
    np.testing.assert_array_equal(fill_ignored(blank), blank)
