"""Run lengths against pycocotools, both ways, and what a hostile string may try."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from loraseg.data.mask_encodings.rle import decode_rle, encode_rle
from loraseg.errors import DatasetError

# pycocotools hands numpy an array type that does not know the keyword `copy` of numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
LABELS = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0, 1, 2, 255]),
)


def reference(mask):
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def blobs(height, width, seed=0):
    """A label map of long and short runs: numbers of one to several characters."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for label in (1, 2, 3, 1, 2):
        top, left = rng.integers(0, height), rng.integers(0, width)
        labels[top : top + rng.integers(height) + 1, left : left + rng.integers(width) + 1] = label
    speckle = rng.random((height, width)) < 0.01
    return np.where(speckle, 2, labels).astype(np.uint8)


def check(labels):
    found = encode_rle(labels, range(256))
    assert [rle["class_id"] for rle in found] == sorted(np.unique(labels).tolist())
    for rle in found:
        mask = labels == rle["class_id"]
        assert {key: rle[key] for key in ("size", "counts")} == reference(mask)
        assert rle["area"] == mask.sum() == coco.area(dict(rle, counts=rle["counts"].encode()))
        np.testing.assert_array_equal(decode_rle(rle), mask)
        np.testing.assert_array_equal(coco.decode(dict(rle, counts=rle["counts"].encode())), mask)


@given(LABELS)
def test_any_small_map_is_what_pycocotools_says(labels):
    check(labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (240, 320), (1100, 900)])
def test_long_runs_are_what_pycocotools_says(shape):
    check(blobs(*shape))
    check(np.zeros(shape, np.uint8))


def test_order_and_choice_of_classes():
    labels = blobs(40, 50)
    everything = {rle["class_id"]: rle for rle in encode_rle(labels, range(4))}
    assert encode_rle(labels, [3, 9, 1]) == [everything[3], everything[1]]
    assert encode_rle(labels.astype(np.int32) + 300, [303])[0]["counts"] == everything[3]["counts"]
    assert encode_rle(np.zeros((0, 5), np.uint8), [0]) == []


def test_strided_maps():
    labels = blobs(40, 50)
    assert encode_rle(labels[::2, ::-1], [1]) == encode_rle(labels[::2, ::-1].copy(), [1])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_runs_of_nothing_are_read_as_pycocotools_does(counts):
    total = sum(counts)
    if total == 0:
        return
    written = coco.frPyObjects({"size": [total, 1], "counts": counts}, total, 1)
    got = decode_rle({"size": [total, 1], "counts": written["counts"]})
    np.testing.assert_array_equal(got, coco.decode(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [3, 5]}, "add up to 12 pixels, expected 3 x 5"),
        ({"size": [12]}, "expected \\[height, width\\]"),
        ({"size": [0, 4]}, "expected \\[height, width\\]"),
        ({"size": [True, 12]}, "expected \\[height, width\\]"),
        ({"size": None}, "expected \\[height, width\\]"),
        ({"size": [10**9, 10**9]}, "at most 64000000 pixels"),
        ({"counts": None}, "compressed dialect"),
        ({"counts": ""}, "compressed dialect"),
        ({"counts": [4, 8]}, "compressed dialect"),
        ({"counts": "0" * 1000}, "compressed dialect"),
        ({"counts": "48 "}, "character of no number"),
        ({"counts": "4\u00e4"}, "a run outside|add up"),
        ({"counts": "48~"}, "character of no number"),
        ({"counts": "4X"}, "cut off"),
        ({"counts": "o" * 20 + "0"}, "over 35 bits"),
        ({"counts": "O<"}, "a run outside"),
        ({"counts": "oooo?"}, "a run outside"),
        ({"area": 7}, "area 7, but counts give 8"),
    ],
)
def test_hostile_masks_are_refused(change, message):
    with pytest.raises(DatasetError, match=message):
        decode_rle({"size": [3, 4], "counts": "48", "area": 8, **change})


@given(st.binary(max_size=60))
def test_any_bytes_are_a_mask_or_refused(counts):
    try:
        mask = decode_rle({"size": [5, 7], "counts": counts})
    except DatasetError:
        return
    assert mask.shape == (5, 7)
