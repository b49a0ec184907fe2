import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from loraseg.adapters import pack
from loraseg.errors import (
    AdapterMismatchError,
    ConfigError,
    DatasetError,
    IntegrityError,
    StoreError,
)
from loraseg.fuse.mix import fuse
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.adapter_ref import AdapterUnavailableError
from loraseg.inference.request import SegmentRequest
from loraseg.inference.runner import SegmentRunner
from loraseg.inference.selection import AdapterSelection, SelectedAdapter
from loraseg.segment.open_vocabulary.pixel_maps import pixel_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import segment_tiled, tile_count
from tests.unit.inference.naive_retriever import Entry
from tests.unit.inference.tiny_service import adapter_query
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, random_adapter, tiny_base

BARE = AdapterSelection("base")
BOTH = frozenset({"confidence", "entropy"})


@pytest.fixture(scope="module")
def base():
    return replace(tiny_base(), window=24)


@pytest.fixture(scope="module")
def packed(base):
    return {name: pack(random_adapter(base, name, seed)) for seed, name in enumerate(DOMAINS)}


@pytest.fixture
def runner(base, packed):
    return SegmentRunner(Predictor(base), lambda entry: packed[entry.name])


def make_selection(packed, **weights):
    return AdapterSelection(
        "fused",
        tuple(
            SelectedAdapter(Entry(name, packed[name].digest, version=3), weight, 1.5)
            for name, weight in weights.items()
        ),
    )


def make_job(runner, image, selection=BARE, **fields):
    """Return a request and its mix."""
    options = {"classes": CLASSES, "query": adapter_query(), **fields}
    return SegmentRequest(image=image, selection=selection, **options), runner.fuse(selection)


def run(runner, *jobs):
    return runner.run([request for request, _ in jobs], [mix for _, mix in jobs])


def picture(name="day", size=(20, 24)):
    return domain_images(name, 1, size=size)[0]


def run_to_completion(work):
    """Exhaust a generator; return its number of yields and its return value."""
    count = 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            return count, end.value
        count += 1


def assert_same(one, other):
    assert one.explanation == other.explanation
    assert (one.label_map == other.label_map).all()
    assert one.tiles == other.tiles
    for name in ("confidence", "entropy"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


def test_fusing_keeps_order_and_weights(runner, packed):
    mix = runner.fuse(make_selection(packed, fog=0.7, day=0.3))
    assert mix.parts == ((packed["fog"], 0.7), (packed["day"], 0.3))
    assert runner.fuse(AdapterSelection("base")) is None


def test_all_unusable_adapters_are_reported_with_their_reasons(base, packed):
    def load(entry):
        if entry.name == "day":
            raise StoreError("no connection")
        if entry.name == "fog":
            return replace(packed["fog"], base_digest="cd" * 32)
        if entry.name == "night":
            return replace(packed["day"], name="night")
        return packed[entry.name]

    selection = make_selection(packed, day=0.25, fog=0.25, night=0.25, dusk=0.25)
    with pytest.raises(AdapterUnavailableError) as info:
        SegmentRunner(Predictor(base), load).fuse(selection)
    assert {failure.name: failure.kind for failure in info.value.failures} == {
        "day": "unreachable",
        "fog": "unfit",
        "night": "damaged",
    }
    assert isinstance(info.value.__cause__, StoreError)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"base_digest": "cd" * 32}, AdapterMismatchError, "trained on base cdcd"),
        ({"digest": "ef" * 32}, IntegrityError, "expected "),
    ],
)
def test_the_cause_of_an_unusable_adapter_is_kept(base, packed, wrong, error, message):
    runner = SegmentRunner(Predictor(base), lambda entry: replace(packed["day"], **wrong))
    with pytest.raises(AdapterUnavailableError) as info:
        runner.fuse(make_selection(packed, day=1.0))
    assert isinstance(info.value.__cause__, error)
    assert message in str(info.value.__cause__)
    if error is IntegrityError:
        assert packed["day"].digest in str(info.value.__cause__)


def test_an_adapter_without_a_base_digest_is_used(base, packed):
    unknown = replace(packed["day"], base_digest=None)
    runner = SegmentRunner(Predictor(base), lambda entry: unknown)
    assert runner.fuse(make_selection(packed, day=1.0)).parts[0][0] is unknown


def test_unexpected_errors_of_a_loader_are_raised(base, packed):
    def load(entry):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SegmentRunner(Predictor(base), load).fuse(make_selection(packed, day=1.0))


def test_the_explanation_has_the_digests_of_the_mixed_adapters(runner, packed):
    """Not those of the catalog: the explanation reports the weights that were used."""
    selection = make_selection(packed, day=0.6, fog=0.4)
    other = fuse([packed["night"], packed["dusk"]], [0.9, 0.1])
    [result] = run(runner, (make_job(runner, picture(), selection)[0], other))
    used = result.explanation.adapters
    assert [part.digest for part in used] == [packed["night"].digest, packed["dusk"].digest]
    assert [part.weight for part in used] == [0.9, 0.1]
    assert [(part.name, part.version, part.distance) for part in used] == [
        ("day", 3, 1.5),
        ("fog", 3, 1.5),
    ]
    assert result.explanation.mix == other.digest
    json.dumps(result.explanation.to_json())


def test_the_explanation_has_mode_and_fallback_of_the_selection(runner):
    selection = AdapterSelection("uniform", (), "nothing was published yet")
    [result] = run(runner, make_job(runner, picture(), selection))
    explanation = result.explanation
    assert (explanation.mode, explanation.fallback) == ("uniform", "nothing was published yet")
    assert (explanation.mix, explanation.adapters) == (None, ())


def test_requests_of_a_batch_give_the_same_results_as_alone(runner, packed):
    fog = make_selection(packed, fog=1.0)
    jobs = [
        make_job(runner, picture("day"), make_selection(packed, day=0.6, night=0.4), maps=BOTH),
        make_job(runner, picture("night", (33, 17)), maps=frozenset({"entropy"})),
        make_job(runner, picture("fog"), fog, keep_scores=True),
        make_job(runner, picture("dusk"), fog, maps=frozenset({"confidence"})),
    ]
    together = run(runner, *jobs)
    for one, result in zip(jobs, together, strict=True):
        [alone] = run(runner, one)
        request = one[0]
        assert_same(result, alone)
        assert result.label_map.shape == request.image.shape[:2]
        assert (result.confidence is not None) == ("confidence" in request.maps)
        assert (result.entropy is not None) == ("entropy" in request.maps)
        assert (result.scores is not None) == request.keep_scores


def test_maps_are_those_of_the_scores(base, runner, packed):
    selection = make_selection(packed, day=0.5, fog=0.5)
    [result] = run(runner, make_job(runner, picture(), selection, maps=BOTH, keep_scores=True))
    [scores] = Predictor(base).predict([picture()], CLASSES, runner.fuse(selection))
    expected = pixel_maps(scores, BOTH)
    np.testing.assert_array_equal(result.scores, scores.numpy())
    np.testing.assert_array_equal(result.label_map, expected.label_map)
    np.testing.assert_array_equal(result.confidence, expected.confidence)
    np.testing.assert_array_equal(result.entropy, expected.entropy)


def test_no_requests_give_no_results(runner):
    assert runner.run([], []) == []


def test_invalid_classes_maps_and_images_are_refused(runner):
    with pytest.raises(ConfigError, match="classes: "):
        run(runner, make_job(runner, picture(), classes=()))
    with pytest.raises(ConfigError, match="maps: got"):
        run(runner, make_job(runner, picture(), maps=frozenset({"depth"})))
    with pytest.raises(DatasetError, match="expected uint8 RGB"):
        run(runner, make_job(runner, picture()[..., :1]))


def test_large_images_are_segmented_in_tiles(base, runner, packed):
    image = picture(size=(40, 48))
    selection = make_selection(packed, day=0.5, night=0.5)
    work = runner.run_tiled(*make_job(runner, image, selection, maps=BOTH))
    yields, result = run_to_completion(work)
    expected_yields, expected = run_to_completion(
        segment_tiled(Predictor(base), image, CLASSES, runner.fuse(selection), BOTH)
    )
    assert yields == expected_yields > 1
    assert result.tiles == tile_count(40, 48, runner.predictor) > yields
    np.testing.assert_array_equal(result.label_map, expected.label_map)
    np.testing.assert_array_equal(result.confidence, expected.confidence)
    np.testing.assert_array_equal(result.entropy, expected.entropy)
    assert [used.name for used in result.explanation.adapters] == ["day", "night"]


def test_other_images_can_run_between_the_tiles_of_a_large_one(runner, packed):
    image = picture(size=(40, 48))
    large = make_job(runner, image, make_selection(packed, day=0.5, night=0.5), maps=BOTH)
    small = make_job(
        runner,
        picture("dusk"),
        make_selection(packed, fog=0.2, dusk=0.8),
        maps=BOTH,
        classes=("car", "road"),
    )
    other = make_job(runner, picture("fog", (48, 40)), maps=BOTH, classes=("sky", "car"))
    _, large_alone = run_to_completion(runner.run_tiled(*large))
    _, other_alone = run_to_completion(runner.run_tiled(*other))
    [small_alone] = run(runner, small)

    first, second = runner.run_tiled(*large), runner.run_tiled(*other)
    results = {}
    while len(results) < 2:
        for name, work in (("large", first), ("other", second)):
            try:
                next(work)
            except StopIteration as end:
                results.setdefault(name, end.value)
        [between] = run(runner, small)
        assert_same(between, small_alone)
    assert_same(results["large"], large_alone)
    assert_same(results["other"], other_alone)


def test_closing_between_tiles_leaves_the_model_unchanged(base, runner, packed):
    small = make_job(runner, picture())
    [before] = run(runner, small)
    large = make_job(runner, picture(size=(40, 48)), make_selection(packed, day=1.0))
    work = runner.run_tiled(*large)
    next(work)
    work.close()
    [after] = run(runner, small)
    assert_same(before, after)
    assert not base.model.training


def test_scores_of_tiles_are_refused(runner):
    large = make_job(runner, picture(size=(40, 48)), keep_scores=True)
    with pytest.raises(ConfigError, match=r"keep_scores: an image of \(40, 48\) pixels"):
        next(runner.run_tiled(*large))


def test_adapters_held_by_a_cache_are_fused_without_loading_them_again(base, packed):
    loaded = []

    def load(entry):
        loaded.append(entry.name)
        return packed[entry.name]

    cache = AdapterCache(load, limit_bytes=1)
    selection = make_selection(packed, day=0.5, fog=0.5)
    with cache.hold([part.entry for part in selection.adapters]):
        runner = SegmentRunner(Predictor(base), cache)
        assert [adapter.name for adapter, _ in runner.fuse(selection).parts] == ["day", "fog"]
    assert loaded == ["day", "fog"]
