import dataclasses
import functools

import numpy as np
import pytest

from loraseg.adapters import pack
from loraseg.data import load_pair, open_dataset
from loraseg.errors import ConfigError, DatasetError
from loraseg.evaluate.leave_one_out import (
    EvaluationContext,
    ScoringConfig,
    TargetDomain,
    TargetScorer,
)
from loraseg.evaluate.methods import METHODS
from loraseg.evaluate.tuning import Hyperparameters
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.unit.data.memory_dataset import memory_copy
from tests.unit.inference.naive_retriever import Entry
from tests.unit.tiny import (
    CLASSES,
    DOMAINS,
    ColorEncoder,
    domain_images,
    merged_base,
    random_adapter,
    tiny_base,
    write_domain,
)

SETTING = Hyperparameters(k=2, temperature=0.3)
CENTROIDS = np.array(list(DOMAINS.values()), dtype=np.float64) / 64


def measure(images):
    embeddings = ColorEncoder().encode_images(images).astype(np.float64)
    return np.linalg.norm(embeddings[:, None] - CENTROIDS[None], axis=2)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def adapters(base):
    return {name: random_adapter(base, name, seed) for seed, name in enumerate(DOMAINS)}


@pytest.fixture(scope="module")
def context(base, adapters):
    entries = [Entry(name, adapter.digest) for name, adapter in adapters.items()]
    return EvaluationContext(base, entries, lambda entry: pack(adapters[entry.name]), measure)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_domain(tmp_path_factory.mktemp("target"), "fog", count=5))


@pytest.fixture(scope="module")
def target(dataset):
    return target_domain(dataset)


def target_domain(dataset):
    load = functools.partial(load_pair, dataset)
    return TargetDomain("fog", "haze", CLASSES, dataset.samples("val"), load, "digest")


@pytest.fixture(scope="module")
def scored(context, target):
    """The scores of every method, in batches of two images."""
    return TargetScorer(context, target, ScoringConfig(batch_size=2)).score_methods(SETTING)


def dense_scores(base, image, parts):
    """Scores of the base with the weighted corrections merged into its weights."""
    return Predictor(merged_base(base, parts)).predict([image], CLASSES, None)[0].numpy()


def naive_prediction(base, adapters, image, method):
    """Predict one image as SemLA describes the methods, one dense model per mix."""
    others = [name for name in DOMAINS if name != "fog"]
    distances = measure([image])[0]
    near = sorted(others, key=lambda name: distances[list(DOMAINS).index(name)])[: SETTING.k]
    sharp = {n: np.exp(1 / distances[list(DOMAINS).index(n)] / SETTING.temperature) for n in near}
    weights = {name: value / sum(sharp.values()) for name, value in sharp.items()}
    if method == "zero_shot":
        return dense_scores(base, image, [])
    if method == "oracle":
        return dense_scores(base, image, [(adapters["fog"], 1.0)])
    if method in ("uniform", "late_uniform"):
        weights = {name: 1 / len(others) for name in others}
    parts = [(adapters[name], weight) for name, weight in weights.items()]
    if method.startswith("late"):
        return sum(
            weight * dense_scores(base, image, [(adapter, 1.0)]) for adapter, weight in parts
        )
    return dense_scores(base, image, parts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_a_loop_over_images(base, adapters, scored, target, method):
    count = ConfusionMatrix(3)
    for sample in target.samples:
        image, label = target.load(sample)
        count.add(label, naive_prediction(base, adapters, image, method).argmax(axis=0))
    score = scored.methods[method]
    # A pixel whose two best scores tie within rounding may flip: a hundredth of a class at most.
    np.testing.assert_allclose(score.iou, count.iou(), rtol=0, atol=5e-3)
    assert score.miou == pytest.approx(count.miou(), abs=5e-3)


def test_methods_differ_and_the_scores_name_their_domain(scored):
    assert list(scored.methods) == list(METHODS)
    assert len({score.miou for score in scored.methods.values()}) == len(METHODS)
    assert (scored.name, scored.family, scored.images) == ("fog", "haze", 5)
    assert scored.setting == SETTING
    assert scored.data_digest == "digest"


def test_a_dataset_without_files_has_the_same_scores(context, dataset, scored):
    in_memory = target_domain(memory_copy(dataset))
    scores = TargetScorer(context, in_memory, ScoringConfig(batch_size=2)).score_methods(SETTING)
    assert scores.methods == scored.methods
    assert scores.weights == scored.weights


def test_the_own_adapter_has_no_weight(scored):
    assert list(scored.weights) == ["day", "night", "dusk"]
    assert sum(scored.weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert scored.weights["day"] > 0.5
    assert scored.distances["day"] < scored.distances["night"]
    [example] = scored.examples
    assert example.retrieved[0][0] == "day"
    assert set(example.predictions) == set(METHODS)
    assert example.label.shape == example.image.shape[:2]


def test_candidates_limit_mixing_but_not_the_oracle(base, context, target, scored):
    limited = EvaluationContext(
        base, context.entries, context.load_adapter, measure, frozenset({"night", "dusk"})
    )
    result = TargetScorer(limited, target, ScoringConfig(batch_size=2, late=False)).score_methods(
        SETTING
    )
    assert list(result.weights) == ["night", "dusk"]
    assert result.methods["oracle"] == scored.methods["oracle"]
    assert result.methods["uniform"] != scored.methods["uniform"]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_do_not_depend_on_the_batch(context, target, scored, batch_size):
    scoring = ScoringConfig(batch_size=batch_size)
    other = TargetScorer(context, target, scoring).score_methods(SETTING)
    for method in METHODS:
        assert scored.methods[method].miou == pytest.approx(other.methods[method].miou, abs=5e-3)


def test_grid_equals_the_score_of_each_setting(context, target):
    settings = [Hyperparameters(k=k, temperature=tau) for k in (1, 2, 9) for tau in (0.05, 1.0)]
    scorer = TargetScorer(context, target, ScoringConfig(batch_size=2, late=False))
    scores = scorer.score_grid(settings)
    for setting, miou in zip(settings, scores, strict=True):
        assert miou == pytest.approx(scorer.score_methods(setting).methods["semla"].miou, abs=5e-3)
    assert scores[0] == scores[1]  # with K = 1 tau has no effect
    assert len(set(scores)) > 2


def test_grid_embeds_each_image_once(base, context, target):
    calls = []

    def counting(images):
        calls.append(len(images))
        return measure(images)

    counted = EvaluationContext(base, context.entries, context.load_adapter, counting)
    settings = [Hyperparameters(k=1, temperature=0.1 * i) for i in range(1, 9)]
    TargetScorer(counted, target, ScoringConfig(batch_size=2)).score_grid(settings, images=3)
    assert calls == [2, 1]


@pytest.fixture
def alternating(target):
    """Fog and night images in turn, so that the mix changes from image to image."""
    night = domain_images("night", 5)

    def load(sample):
        image, label = target.load(sample)
        return (night[int(sample.id)] if int(sample.id) % 2 else image), label

    return TargetDomain("fog", "haze", CLASSES, target.samples, load)


def test_first_image_text_changes_only_later_images_of_per_image_mixes(context, alternating):
    default, first_image = (
        TargetScorer(
            context, alternating, ScoringConfig(text_cache=text_cache, late=False, examples=5)
        ).score_methods(SETTING)
        for text_cache in ("per_adapter", "first_image")
    )
    for method in ("zero_shot", "uniform", "oracle"):
        assert default.methods[method] == first_image.methods[method]
    changed = [
        (a.predictions["semla"] != b.predictions["semla"]).mean()
        for a, b in zip(default.examples, first_image.examples, strict=True)
    ]
    # The memory alignment of the text features decides how products round: ties may flip.
    assert changed[0] <= 0.01
    assert max(changed[1:]) > max(0.01, 2 * changed[0])


def test_first_image_text_in_the_grid_equals_the_score(context, alternating):
    settings = [Hyperparameters(k=2, temperature=0.3), Hyperparameters(k=3, temperature=1.0)]
    scorer = TargetScorer(context, alternating, ScoringConfig(text_cache="first_image", late=False))
    scores = [scorer.score_methods(setting).methods["semla"].miou for setting in settings]
    assert scorer.score_grid(settings) == pytest.approx(scores, abs=5e-3)


def test_without_an_own_adapter_there_is_no_oracle(context, target):
    unknown = TargetDomain("city", "x", CLASSES, target.samples, target.load)
    result = TargetScorer(context, unknown, ScoringConfig(late=False)).score_methods(SETTING)
    assert list(result.methods) == ["zero_shot", "uniform", "semla"]
    assert list(result.weights) == list(DOMAINS)


def test_refuses_a_domain_without_another_adapter(base, context, target):
    alone = EvaluationContext(base, context.entries[1:2], context.load_adapter, measure)
    with pytest.raises(ConfigError, match="'fog': no other adapter"):
        TargetScorer(alone, target, ScoringConfig())


def test_refuses_images_without_labels_and_no_images(context, target):
    unlabelled = [dataclasses.replace(sample, mask=None) for sample in target.samples]
    with pytest.raises(DatasetError, match="has no mask"):
        TargetScorer(
            context, dataclasses.replace(target, samples=unlabelled), ScoringConfig()
        ).score_methods(SETTING)
    empty = dataclasses.replace(target, samples=())
    with pytest.raises(DatasetError, match="no images"):
        TargetScorer(context, empty, ScoringConfig()).score_methods(SETTING)
