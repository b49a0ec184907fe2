import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraseg.errors import AdapterMismatchError, IntegrityError, StageError
from loraseg.library import Centroid
from loraseg.library.centroid import CentroidFile
from loraseg.storage.json_io import canonical_json, parse_json_as
from tests.unit.library.sample_adapters import make_centroid


def centroid_of(rows):
    return Centroid.from_embeddings(np.asarray(rows), encoder_id="clip", normalised=False)


def test_mean_count_and_spread_by_hand():
    centroid = centroid_of([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])
    assert centroid.vector.tolist() == [0.0, 0.0]
    assert centroid.count == 4
    assert centroid.spread == pytest.approx(math.sqrt((9 + 9 + 16 + 16) / 4), rel=1e-15)


def test_mean_is_not_scaled_to_unit_length():
    assert centroid_of(np.full((2, 3), 10, dtype=np.float32)).vector.tolist() == [10.0, 10.0, 10.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_merging_parts_equals_the_whole(seed, sizes):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(scale=10), 2, (n, 6)) for n in sizes]
    merged = centroid_of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(centroid_of(part))
    whole = np.concatenate(parts)
    assert merged.count == len(whole)
    np.testing.assert_allclose(merged.vector, whole.mean(axis=0), rtol=0, atol=1e-12)
    squares = np.linalg.norm(whole - whole.mean(axis=0), axis=1) ** 2
    assert merged.spread == pytest.approx(np.sqrt(squares.mean()), rel=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        make_centroid(encoder_id="other"),
        make_centroid(normalised=True),
        make_centroid((1.0, 2.0, 3.0)),
    ],
)
def test_different_kinds_cannot_be_merged(other):
    with pytest.raises(AdapterMismatchError, match="cannot be merged"):
        make_centroid().merge(other)


def test_unknown_count_cannot_be_merged():
    unknown = Centroid("clip", False, np.zeros(2), None, None)
    with pytest.raises(AdapterMismatchError, match="unknown count or spread"):
        make_centroid().merge(unknown)


def parse_centroid(values):
    data = canonical_json(values)
    file = parse_json_as(CentroidFile, data, "x", max_bytes=10**6, error=IntegrityError)
    return Centroid.from_file(file)


def test_json_is_exact():
    centroid = centroid_of(np.random.default_rng(0).normal(size=(7, 20)) / 3)
    again = parse_centroid(centroid.to_json())
    assert again == centroid
    assert hash(again) == hash(centroid)
    assert again.vector.tobytes() == centroid.vector.tobytes()
    assert centroid_of([[1.0, 2.0]]) != centroid_of([[1.0, 2.5]])


def test_the_vector_is_a_read_only_copy():
    source = np.zeros(2)
    centroid = Centroid("clip", False, source, 1, 0.0)
    source[0] = 9
    assert centroid.vector[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        centroid.vector[0] = 1


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), [[math.nan, 0.0]], [[math.inf, 0.0]]])
def test_empty_or_infinite_embeddings_are_rejected(rows):
    with pytest.raises(StageError, match="all values finite"):
        centroid_of(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": []}, r"expected \(d,\)"),
        ({"vector": [[1.0]]}, "vector.0: got .* expected a valid number"),
        ({"vector": [True]}, "vector.0: got True, expected a valid number"),
        ({"vector": None}, "vector: got None, expected a valid"),
        ({"vector": ["1e400"]}, "vector.0: got '1e400', expected a valid number"),
        ({"vector": [10**400]}, "not finite"),
        ({"encoder_id": ""}, "encoder id of 0"),
        ({"encoder_id": 3}, "encoder_id: got 3, expected a valid string"),
        ({"normalised": 1}, "normalised: got 1, expected a valid boolean"),
        ({"count": 0}, "count 0"),
        ({"count": 1.5}, "count: got 1.5, expected a valid integer"),
        ({"spread": -1}, "spread -1"),
        ({"spread": "x"}, "spread: got 'x', expected a valid number"),
    ],
)
def test_hostile_json(change, message):
    with pytest.raises(IntegrityError, match=message):
        parse_centroid({**make_centroid().to_json(), **change})
