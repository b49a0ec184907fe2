import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from loraseg.adapters import pack
from loraseg.errors import AdapterMismatchError, ConfigError, DatasetError, StoreError
from loraseg.fuse.mix import fuse
from loraseg.inference.adapter_cache import AdapterPool
from loraseg.inference.segmenter import Segmenter, run_to_completion
from loraseg.inference.selection import PRESETS, AdaptiveSettings, default_adaptive_settings
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling, segment_tiled, tile_count
from tests.unit.inference.naive_retriever import Entry, NaiveRetriever
from tests.unit.tiny import (
    CLASSES,
    DOMAINS,
    ColorEncoder,
    domain_images,
    merged_base,
    random_adapter,
    tiny_base,
)

TILINGS = ("auto", "never", "always")


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def adapters(base):
    return {name: random_adapter(base, name, seed) for seed, name in enumerate(DOMAINS)}


@pytest.fixture
def pool(adapters):
    entries = [Entry(name, adapter.digest) for name, adapter in adapters.items()]
    centroids = [np.array(color, dtype=np.float64) / 64 for color in DOMAINS.values()]
    return AdapterPool(
        entries, lambda e: pack(adapters[e.name]), NaiveRetriever(entries, centroids)
    )


def images():
    return [domain_images("day", 1)[0], domain_images("night", 1, size=(17, 30))[0]]


def segmenter(base, pool, **settings):
    return Segmenter(Predictor(base), ColorEncoder(), pool, AdaptiveSettings(**settings))


@pytest.mark.parametrize("settings", [{"k": 3, "temperature": 0.6}, {"mode": "uniform"}])
def test_equals_the_base_with_the_weighted_updates_merged(base, adapters, pool, settings):
    results = segmenter(base, pool, **settings).segment(images(), CLASSES, keep_scores=True)
    for image, result in zip(images(), results, strict=True):
        parts = [(adapters[used.name], used.weight) for used in result.explanation.adapters]
        [dense] = Predictor(merged_base(base, parts)).predict([image], CLASSES, None)
        [bare] = Predictor(base).predict([image], CLASSES, None)
        assert result.scores.shape == (3, *image.shape[:2])
        np.testing.assert_allclose(result.scores, dense.numpy(), rtol=0, atol=1e-5)
        assert np.abs(result.scores - bare.numpy()).max() > 1e-2
        assert (result.label_map == result.scores.argmax(axis=0)).all()


def test_every_image_has_its_own_mix_and_explanation(base, adapters, pool):
    day, night = segmenter(base, pool, k=2, temperature=0.3).segment(images(), CLASSES)
    assert [used.name for used in day.explanation.adapters] == ["day", "fog"]
    assert [used.name for used in night.explanation.adapters] == ["night", "dusk"]
    for result in (day, night):
        used = result.explanation.adapters
        assert sum(part.weight for part in used) == pytest.approx(1.0, abs=1e-12)
        assert used[0].distance < used[1].distance
        assert used[0].digest == adapters[used[0].name].digest
    assert day.explanation.mix != night.explanation.mix
    assert json.loads(json.dumps(day.explanation.to_json()))["adapters"][0]["name"] == "day"


def test_batch_and_order_do_not_matter(base, pool):
    settings = {"k": 2, "temperature": 0.3}
    both = segmenter(base, pool, **settings).segment(images(), CLASSES, keep_scores=True)
    for picture, one in zip(images(), both, strict=True):
        [other] = segmenter(base, pool, **settings).segment([picture], CLASSES, keep_scores=True)
        # Convolutions of another batch size may round otherwise.
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)
        assert one.explanation == other.explanation


def test_the_base_mode_uses_no_adapter(base, pool):
    [result] = segmenter(base, pool, mode="base").segment(images()[:1], CLASSES)
    [bare] = Predictor(base).predict(images()[:1], CLASSES, None)
    assert (result.label_map == bare.numpy().argmax(axis=0)).all()
    assert result.explanation.adapters == ()
    assert result.explanation.fallback is None
    assert result.explanation.mix is None


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_falls_back_to_the_base_with_a_reason(base, pool, mode):
    empty = AdapterPool((), pool.load, None, "the library is empty")
    [result] = segmenter(base, empty, mode=mode).segment(images()[:1], CLASSES)
    [bare] = Predictor(base).predict(images()[:1], CLASSES, None)
    assert (result.label_map == bare.numpy().argmax(axis=0)).all()
    assert result.explanation.fallback == "the library is empty"
    [result] = segmenter(base, pool, mode=mode).segment(images()[:1], CLASSES, exclude=DOMAINS)
    assert result.explanation.fallback == "every adapter was excluded"


def test_excluded_adapters_are_not_used(base, pool):
    results = segmenter(base, pool, k=9).segment(images(), CLASSES, exclude={"day", "dusk"})
    for result in results:
        assert {used.name for used in result.explanation.adapters} == {"fog", "night"}


def test_refuses_an_adapter_of_another_base(base, pool):
    other = random_adapter(merged_base(base, []), "day", 0)
    wrong = AdapterPool(pool.entries, lambda entry: pack(other), pool.retriever)
    with pytest.raises(AdapterMismatchError, match="'day' was trained on base cdcd"):
        segmenter(base, wrong, k=1).segment(images()[:1], CLASSES)


@pytest.mark.parametrize("classes", [[], ["road", "car", "road"]])
def test_refuses_invalid_class_lists(base, pool, classes):
    with pytest.raises(ConfigError, match="classes: "):
        segmenter(base, pool).segment(images(), classes)


def test_a_stream_gives_the_same_results_as_single_calls(base, pool):
    counts = (1, 2, 1)
    stream = segmenter(base, pool, k=2, temperature=0.3).segment_stream(
        (images()[:count] for count in counts), CLASSES
    )
    for count, results in zip(counts, stream, strict=True):
        alone = segmenter(base, pool, k=2, temperature=0.3).segment(images()[:count], CLASSES)
        assert [one.explanation for one in results] == [one.explanation for one in alone]
        for one, other in zip(results, alone, strict=True):
            assert (one.label_map == other.label_map).all()


def test_a_stream_prepares_the_next_batch_while_one_is_in_the_model(base, pool, monkeypatch):
    asked = threading.Event()

    def batches():
        yield images()
        asked.set()
        yield images()

    predictor = Predictor(base)
    predict = predictor.predict

    def wait_for_the_next(*arguments):
        assert asked.wait(timeout=30)
        return predict(*arguments)

    monkeypatch.setattr(predictor, "predict", wait_for_the_next)
    ahead = Segmenter(predictor, ColorEncoder(), pool, AdaptiveSettings(k=1))
    assert [len(results) for results in ahead.segment_stream(batches(), CLASSES)] == [2, 2]


def test_an_error_of_one_batch_does_not_end_the_stream(base, pool, adapters):
    def load(entry):
        if entry.name == "night":
            raise StoreError("night: gone")
        return pack(adapters[entry.name])

    broken = AdapterPool(pool.entries, load, pool.retriever)
    day, night = images()
    stream = segmenter(base, broken, k=1).segment_stream([[day], [night], [day]], CLASSES)
    first, second, third = stream
    assert isinstance(second, StoreError)
    assert (first[0].label_map == third[0].label_map).all()


def test_errors_of_the_source_are_raised(base, pool):
    def batches():
        yield images()
        raise ValueError("a bug")

    stream = segmenter(base, pool, k=1).segment_stream(batches(), CLASSES)
    assert len(next(stream)) == 2
    with pytest.raises(ValueError, match="a bug"):
        next(stream)


def test_further_maps_are_computed_on_request(base, pool):
    [plain] = segmenter(base, pool).segment(images()[:1], CLASSES)
    assert plain.confidence is plain.entropy is None
    [result] = segmenter(base, pool).segment(
        images()[:1], CLASSES, maps=["entropy", "confidence"], keep_scores=True
    )
    np.testing.assert_array_equal(result.confidence, result.scores.max(axis=0))
    shares = result.scores.astype(np.float64) / result.scores.sum(axis=0, dtype=np.float64)
    entropy = -(shares * np.log(shares)).sum(axis=0) / np.log(len(CLASSES))
    np.testing.assert_allclose(result.entropy, entropy, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def small_window(base):
    return replace(base, window=16)


@pytest.mark.parametrize("mode", ["plain", "sliding"])
def test_large_images_are_tiled_in_either_mode(small_window, adapters, pool, mode):
    predictor = Predictor(small_window, mode=mode)
    adaptive = Segmenter(predictor, ColorEncoder(), pool, AdaptiveSettings(k=2))
    side = next(n for n in range(20, 400) if needs_tiling(20, n, predictor))
    large, nearly = (domain_images("day", 1, size=(20, n))[0] for n in (side, side - 1))
    tiled, whole, small = adaptive.segment(
        [large, nearly, images()[1]], CLASSES, maps=["confidence"]
    )
    assert (tiled.tiles, whole.tiles, small.tiles) == (tile_count(20, side, predictor), 1, 1)
    assert tiled.tiles > 1
    expected = run_to_completion(segment_tiled(predictor, large, CLASSES, _mix_of(tiled, adapters)))
    assert (tiled.label_map == expected.label_map).all()
    [scores] = predictor.predict([nearly], CLASSES, _mix_of(whole, adapters))
    # Another batch size rounds otherwise, which changes the class where scores are alike.
    np.testing.assert_allclose(whole.confidence, scores.numpy().max(axis=0), rtol=0, atol=1e-5)


def _mix_of(result, adapters):
    used = result.explanation.adapters
    return fuse([adapters[part.name] for part in used], [part.weight for part in used])


def test_tiling_follows_the_option(small_window, pool):
    adaptive = segmenter(small_window, pool, k=2)
    large, small = domain_images("day", 1, size=(52, 40))[0], images()[0]
    assert [adaptive.segment([large], CLASSES, tiling=t)[0].tiles for t in TILINGS] == [24, 1, 24]
    assert [adaptive.segment([small], CLASSES, tiling=t)[0].tiles for t in TILINGS] == [1, 1, 4]


def test_an_image_of_one_window_is_the_same_with_and_without_tiles(small_window, pool):
    image = domain_images("day", 1, size=(16, 16))[0]
    plain, tiled = (
        segmenter(replace(small_window, pad_multiple=1), pool).segment(
            [image], CLASSES, maps=["confidence"], tiling=tiling
        )[0]
        for tiling in ("never", "always")
    )
    np.testing.assert_allclose(tiled.confidence, plain.confidence, rtol=0, atol=1e-5)
    assert (tiled.label_map == plain.label_map).all()
    assert tiled.explanation == plain.explanation


def test_a_stream_supports_maps_and_tiles(small_window, pool):
    large = domain_images("day", 1, size=(52, 40))[0]
    options = {"maps": ["entropy"], "tiling": "auto"}
    adaptive = segmenter(small_window, pool, k=2)
    [[one, other]] = adaptive.segment_stream([[large, images()[0]]], CLASSES, **options)
    alone, small = adaptive.segment([large, images()[0]], CLASSES, **options)
    assert (one.tiles, other.tiles) == (24, 1)
    assert (one.entropy == alone.entropy).all()
    assert (other.entropy == small.entropy).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": ["depth"]}, r"maps: got \['depth'\]"),
        ({"tiling": "always", "keep_scores": True}, "keep_scores: an image of"),
    ],
)
def test_invalid_options_are_refused(base, pool, options, message):
    with pytest.raises(ConfigError, match=message):
        segmenter(base, pool).segment(images(), CLASSES, **options)


def test_invalid_images_are_refused(base, pool):
    with pytest.raises(DatasetError, match="expected uint8 RGB"):
        segmenter(base, pool, mode="base").segment([images()[0][..., 0]], CLASSES)


def test_no_images_give_no_results(base, pool):
    assert segmenter(base, pool).segment([], CLASSES) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k: got 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "nan"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveSettings(**values)


def test_presets():
    assert (
        default_adaptive_settings("ViT-L-14/openai").k,
        default_adaptive_settings("ViT-L-14/openai").temperature,
    ) == (5, 0.05)
    assert default_adaptive_settings("miniature") == PRESETS["miniature"]
