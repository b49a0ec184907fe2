"""Outlines against a fill by the even-odd rule, and against scipy's regions and holes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from loraseg.data.mask_encodings.polygons import outline_polygons
from loraseg.errors import DatasetError

LABELS = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.integers(0, 2),
)


def fill(rings, shape):
    """Even-odd rule at the middles of pixels: edges left of a middle, on its row, are counted."""
    crossings = np.zeros(shape, int)
    for ring in rings:
        for (x, y), (x2, y2) in zip(ring, [*ring[1:], ring[0]], strict=True):
            if x == x2:
                crossings[min(y, y2) : max(y, y2), x:] += 1
    return crossings % 2 == 1


def area(ring):
    """Shoelace formula, above 0 if clockwise on a screen."""
    ahead = [*ring[1:], ring[0]]
    return sum(x * y2 - x2 * y for (x, y), (x2, y2) in zip(ring, ahead, strict=True)) / 2


def is_simple(ring):
    """No point twice, no corner on a line, edges of one axis in turn, none crossing another."""
    ahead = [*ring[1:], ring[0]]
    kinds = [x == x2 for (x, y), (x2, y2) in zip(ring, ahead, strict=True)]
    turns = all(one != other for one, other in zip(kinds, [*kinds[1:], kinds[0]], strict=True))
    straight = all((x == x2) != (y == y2) for (x, y), (x2, y2) in zip(ring, ahead, strict=True))
    passed = [
        (x, y)
        for (x1, y1), (x2, y2) in zip(ring, ahead, strict=True)
        for x in range(min(x1, x2), max(x1, x2) + 1)
        for y in range(min(y1, y2), max(y1, y2) + 1)
    ]
    # Every lattice point of the outline belongs to one edge, every corner to two.
    return turns and straight and len(passed) - len(ring) == len(set(passed))


def check(labels):
    found = outline_polygons(labels, range(256))
    assert json.loads(json.dumps(found)) == found
    classes = [polygon["class_id"] for polygon in found]
    assert classes == sorted(classes)
    for label in np.unique(labels).tolist():
        mask = labels == label
        own = [polygon for polygon in found if polygon["class_id"] == label]
        rings = [ring for one in own for ring in (one["exterior"], *one["holes"])]
        np.testing.assert_array_equal(fill(rings, labels.shape), mask)
        regions, count = ndimage.label(mask)
        assert len(own) == count
        seen = set()
        for polygon in own:
            check_polygon(polygon, regions, seen)
        assert len(seen) == count


def check_polygon(polygon, regions, seen):
    """The polygon is one region of scipy's, its holes are what scipy would fill."""
    rings = [polygon["exterior"], *polygon["holes"]]
    assert all(is_simple(ring) for ring in rings)
    assert area(polygon["exterior"]) > 0
    assert all(area(ring) < 0 for ring in polygon["holes"])
    x, y = polygon["exterior"][0]
    assert [x, y] == min(polygon["exterior"], key=lambda point: (point[1], point[0]))
    region = regions == regions[y, x]
    np.testing.assert_array_equal(fill(rings, regions.shape), region)
    filled = fill([polygon["exterior"]], regions.shape)
    np.testing.assert_array_equal(filled, ndimage.binary_fill_holes(region))
    # Holes are 4-connected: two that touch at a corner are separate.
    _, holes = ndimage.label(filled & ~region)
    assert len(polygon["holes"]) == holes
    seen.add(int(regions[y, x]))


@settings(max_examples=150, deadline=None)
@given(LABELS)
def test_any_small_map(labels):
    check(labels)


@pytest.mark.parametrize(
    "rows",
    [
        ["1"],
        ["10", "01"],
        ["01", "10"],
        ["111", "101", "111"],
        ["011", "101", "111"],
        ["110", "101", "111"],
        ["111", "101", "110"],
        ["111", "101", "011"],
        ["11111", "10101", "11111", "10101", "11111"],
        ["11111", "10111", "11011", "11101", "11111"],
        ["11111", "11101", "11011", "10111", "11111"],
        ["1111111", "1000001", "1011101", "1010101", "1011101", "1000001", "1111111"],
        ["1111111", "1010101", "1101011", "1010101", "1111111"],
    ],
)
def test_points_that_touch_and_holes_in_holes(rows):
    labels = np.array([[int(character) for character in row] for row in rows], np.uint8)
    check(labels)
    check(np.kron(labels, np.ones((3, 2), np.uint8)))


def test_a_ring_is_written_like_this():
    labels = np.zeros((4, 5), np.uint8)
    labels[0:3, 1:4] = 1
    labels[1, 2] = 2
    (ring,) = outline_polygons(labels, [1])
    assert ring == {
        "class_id": 1,
        "exterior": [[1, 0], [4, 0], [4, 3], [1, 3]],
        "holes": [[[3, 1], [2, 1], [2, 2], [3, 2]]],
    }


@pytest.mark.parametrize("seed", range(3))
def test_blobs_of_a_larger_map(seed):
    field = np.random.default_rng(seed).normal(size=(120, 110))
    check(np.digitize(ndimage.gaussian_filter(field, 3) * 20, [-1, 0, 1]).astype(np.uint8))


def test_blocks_of_rows_change_nothing(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, (23, 17)).astype(np.uint8)
    expected = outline_polygons(labels, range(3))
    for rows in (0, 1, 2, 7, 24):
        monkeypatch.setattr("loraseg.data.mask_encodings.polygons._BLOCK_PIXELS", rows * 18)
        assert outline_polygons(labels, range(3)) == expected


def test_chosen_classes_only():
    labels = np.random.default_rng(0).integers(0, 4, (20, 20)).astype(np.int32) * 1000
    everything = outline_polygons(labels, [0, 1000, 2000, 3000])
    assert outline_polygons(labels, [3000, 1000, 7]) == [
        polygon for polygon in everything if polygon["class_id"] in (1000, 3000)
    ]
    assert outline_polygons(labels, []) == []
    assert outline_polygons(np.zeros((0, 4), np.uint8), [0]) == []


def test_corners_are_bounded():
    noise = (np.indices((40, 40)).sum(axis=0) % 2).astype(np.uint8)
    assert len(outline_polygons(noise, [1], max_points=3200)) == 800
    with pytest.raises(DatasetError, match=r"over 3199 corners in a label map of 40 x 40"):
        outline_polygons(noise, [1], max_points=3199)
