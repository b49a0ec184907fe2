"""Label map, confidence and entropy against loops over pixels in float64."""

import math

import numpy as np
import pytest
import torch

from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.pixel_maps import MAPS, empty_maps, label_map, pixel_maps


def random_scores(classes, height=7, width=9, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.sigmoid(torch.randn(classes, height, width, generator=generator) * scale)


def slow_entropy(values):
    """Return -sum p log p / log t of one pixel, by its definition."""
    total = math.fsum(values)
    shares = [value / total for value in values]
    terms = [share * math.log(share) for share in shares if share > 0]
    return -math.fsum(terms) / math.log(len(values))


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_maps_equal_a_loop_over_pixels(classes, scale):
    scores = random_scores(classes, scale=scale)
    result = pixel_maps(scores, MAPS)
    for row, column in np.ndindex(7, 9):
        values = scores[:, row, column].double().tolist()
        label = values.index(max(values))
        assert result.label_map[row, column] == label
        assert result.confidence[row, column] == values[label]
        assert result.entropy[row, column] == pytest.approx(slow_entropy(values), abs=2e-6)


def test_only_requested_maps_are_computed():
    scores = random_scores(3)
    assert pixel_maps(scores).confidence is None
    assert pixel_maps(scores).entropy is None
    assert pixel_maps(scores, {"confidence"}).entropy is None
    assert pixel_maps(scores, ["entropy"]).confidence is None


def test_blocks_of_rows_change_at_most_the_last_bit(monkeypatch):
    scores = random_scores(5, 33, 17)
    whole = pixel_maps(scores, MAPS)
    monkeypatch.setattr("loraseg.segment.open_vocabulary.pixel_maps._BLOCK_SCORES", 5 * 17 * 2 + 1)
    result = pixel_maps(scores, MAPS).entropy
    np.testing.assert_allclose(result, whole.entropy, rtol=2e-7, atol=0)


@pytest.mark.parametrize("power", [1.0, 1e-3, 1e-30, 1e-38])
def test_entropy_depends_on_ratios_only(power):
    scores = random_scores(4)
    expected = pixel_maps(scores, {"entropy"}).entropy
    result = pixel_maps(scores * power, {"entropy"}).entropy
    # Below 1e-38 float32 values are denormal.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 if power > 1e-38 else 1e-4)


def test_entropy_of_certain_and_uniform_scores():
    certain = torch.zeros(3, 2, 2)
    certain[1] = 0.7
    assert np.all(pixel_maps(certain, {"entropy"}).entropy == 0)
    for alike in (0.0, 1e-45, 0.5, 1.0):
        result = pixel_maps(torch.full((3, 2, 2), alike), {"entropy"}).entropy
        np.testing.assert_allclose(result, 1, rtol=0, atol=1e-6)
        assert result.max() <= 1
    assert np.all(pixel_maps(torch.rand(1, 2, 2), {"entropy"}).entropy == 0)


def test_ties_go_to_the_first_class():
    scores = torch.zeros(4, 1, 3)
    scores[2:, 0, 1] = 0.5
    scores[[1, 3], 0, 2] = 0.5
    assert label_map(scores).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize(("classes", "kind"), [(1, np.uint8), (255, np.uint8), (256, np.int32)])
def test_type_of_the_label_map(classes, kind):
    scores = torch.zeros(classes, 2, 2)
    scores[-1] = 1
    labels = pixel_maps(scores).label_map
    assert labels.dtype == kind == empty_maps(2, 2, classes, ()).label_map.dtype
    assert (labels == classes - 1).all()


def test_empty_maps_have_the_shapes_and_dtypes_of_the_results():
    filled, empty = pixel_maps(random_scores(3), {"entropy"}), empty_maps(7, 9, 3, {"entropy"})
    assert empty.confidence is None
    for actual, other in ((filled.label_map, empty.label_map), (filled.entropy, empty.entropy)):
        assert (actual.shape, actual.dtype) == (other.shape, other.dtype)


def test_unknown_maps_are_refused():
    with pytest.raises(ConfigError, match=r"maps: got \['depth'\], expected some of"):
        pixel_maps(random_scores(2), {"confidence", "depth"})
    with pytest.raises(ConfigError, match="depth"):
        empty_maps(2, 2, 2, {"depth"})


def test_label_map_takes_the_first_of_equal_scores_and_grows_beyond_255_classes():
    scores = torch.zeros(300, 2, 2)
    scores[299, 0, 0] = 1
    labels = label_map(scores)
    assert labels.dtype == np.int32
    assert labels.tolist() == [[299, 0], [0, 0]]
    assert label_map(torch.ones(3, 2, 2)).dtype == np.uint8
    assert label_map(torch.ones(3, 2, 2)).max() == 0
