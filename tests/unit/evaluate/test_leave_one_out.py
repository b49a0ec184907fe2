import dataclasses
import functools

import numpy as np
import pytest

from loraseg.adapters import pack
from loraseg.data import load_pair, open_dataset
from loraseg.errors import ConfigError, DatasetError
from loraseg.evaluate.leave_one_out import (
    METHODS,
    EvaluationContext,
    ScoringConfig,
    TargetDomain,
    TargetScorer,
)
from loraseg.evaluate.tuning import Hyperparameters
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.unit.data.memory_dataset import memory_copy
from tests.unit.inference.test_pipeline import Entry
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


@pytest.fixture
def bench(base, adapters):
    entries = [Entry(name, adapter.digest) for name, adapter in adapters.items()]
    return EvaluationContext(base, entries, lambda entry: pack(adapters[entry.name]), measure)


@pytest.fixture
def target(tmp_path):
    return target_domain(open_dataset(write_domain(tmp_path, "fog", count=5)))


def target_domain(dataset):
    load = functools.partial(load_pair, dataset)
    return TargetDomain("fog", "haze", CLASSES, dataset.samples("val"), load, "digest")


def dense_scores(base, image, parts):
    """Scores of the base with the weighted corrections merged into its weights."""
    return Predictor(merged_base(base, parts)).predict([image], CLASSES, None)[0].numpy()


def naive_prediction(base, adapters, image, method):
    """Methods B.4 to B.6 for one image, one adapter at a time."""
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
        return sum(weight * dense_scores(base, image, [(one, 1.0)]) for one, weight in parts)
    return dense_scores(base, image, parts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_a_loop_over_images(base, adapters, bench, target, method):
    result = TargetScorer(bench, target, ScoringConfig(batch_size=2)).score_methods(SETTING)
    count = ConfusionMatrix(3)
    for sample in target.samples:
        image, mask = target.load(sample)
        count.add(mask, naive_prediction(base, adapters, image, method).argmax(axis=0))
    score = result.methods[method]
    # A pixel whose two best scores tie within rounding may flip: a hundredth of a class at most.
    np.testing.assert_allclose(score.iou, count.iou(), rtol=0, atol=5e-3)
    assert score.miou == pytest.approx(count.miou(), abs=5e-3)


def test_methods_differ_and_the_result_says_where_it_comes_from(bench, target):
    result = TargetScorer(bench, target, ScoringConfig(batch_size=2)).score_methods(SETTING)
    assert tuple(result.methods) == METHODS
    assert len({score.miou for score in result.methods.values()}) == len(METHODS)
    assert (result.name, result.family, result.images) == ("fog", "haze", 5)
    assert result.setting == SETTING
    assert result.data_digest == "digest"


def test_a_dataset_without_files_gets_the_same_scores(bench, target, tmp_path):
    in_memory = target_domain(memory_copy(open_dataset(tmp_path)))
    expected, scores = (
        TargetScorer(bench, domain, ScoringConfig()).score_methods(SETTING)
        for domain in (target, in_memory)
    )
    assert scores.methods == expected.methods
    assert scores.weights == expected.weights


def test_the_own_adapter_gets_no_weight(bench, target):
    result = TargetScorer(bench, target, ScoringConfig()).score_methods(SETTING)
    assert list(result.weights) == ["day", "night", "dusk"]
    assert sum(result.weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert result.weights["day"] > 0.5
    assert result.distances["day"] < result.distances["night"]
    [example] = result.examples
    assert example.retrieved[0][0] == "day"
    assert set(example.predictions) == set(METHODS)
    assert example.label.shape == example.image.shape[:2]


def test_candidates_bind_mixing_but_not_the_oracle(base, adapters, bench, target):
    bound = EvaluationContext(
        base, bench.entries, bench.load, measure, frozenset({"night", "dusk"})
    )
    free = TargetScorer(bench, target, ScoringConfig()).score_methods(SETTING)
    result = TargetScorer(bound, target, ScoringConfig()).score_methods(SETTING)
    assert list(result.weights) == ["night", "dusk"]
    assert result.methods["oracle"] == free.methods["oracle"]
    assert result.methods["uniform"] != free.methods["uniform"]


def test_results_do_not_depend_on_the_batch(bench, target):
    one = TargetScorer(bench, target, ScoringConfig(batch_size=1)).score_methods(SETTING)
    all_at_once = TargetScorer(bench, target, ScoringConfig(batch_size=8)).score_methods(SETTING)
    for method in METHODS:
        assert one.methods[method].miou == pytest.approx(all_at_once.methods[method].miou, abs=5e-3)


def test_grid_equals_the_score_of_each_setting(bench, target):
    settings = [Hyperparameters(k=k, temperature=tau) for k in (1, 2, 9) for tau in (0.05, 1.0)]
    scorer = TargetScorer(bench, target, ScoringConfig(batch_size=2, late=False))
    found = scorer.score_grid(settings)
    for setting, miou in zip(settings, found, strict=True):
        assert miou == pytest.approx(scorer.score_methods(setting).methods["semla"].miou, abs=5e-3)
    assert found[0] == found[1]  # K = 1 leaves nothing for tau to decide
    assert len(set(found)) > 2


def test_grid_embeds_an_image_once_and_shares_equal_mixes(base, bench, target):
    calls = []

    def counting(images):
        calls.append(len(images))
        return measure(images)

    counted = EvaluationContext(base, bench.entries, bench.load, counting)
    settings = [Hyperparameters(k=1, temperature=0.1 * i) for i in range(1, 9)]
    TargetScorer(counted, target, ScoringConfig(batch_size=2)).score_grid(settings, images=3)
    assert calls == [2, 1]


@pytest.fixture
def mixed(target):
    """Fog and night by turns, so that mixes differ from image to image."""
    night = domain_images("night", 5)

    def load(sample):
        image, mask = target.load(sample)
        return (night[int(sample.id)] if int(sample.id) % 2 else image), mask

    return TargetDomain("fog", "haze", CLASSES, target.samples, load)


def test_first_image_text_changes_only_later_images_of_per_image_mixes(bench, mixed):
    target = mixed
    parity = ScoringConfig(text_cache="first_image", late=False, examples=5)
    ours = TargetScorer(bench, target, ScoringConfig(late=False, examples=5)).score_methods(SETTING)
    theirs = TargetScorer(bench, target, parity).score_methods(SETTING)
    for method in ("zero_shot", "uniform", "oracle"):
        assert ours.methods[method] == theirs.methods[method]
    first, *rest = zip(ours.examples, theirs.examples, strict=True)
    changed = [(a.predictions["semla"] != b.predictions["semla"]).mean() for a, b in [first, *rest]]
    # Where the text lies in memory decides how its products round: ties may go to either class.
    assert changed[0] <= 0.01
    assert max(changed[1:]) > max(0.01, 2 * changed[0])


def test_first_image_text_in_the_grid_equals_the_score(bench, mixed):
    settings = [Hyperparameters(k=2, temperature=0.3), Hyperparameters(k=3, temperature=1.0)]
    scorer = TargetScorer(bench, mixed, ScoringConfig(text_cache="first_image", late=False))
    scores = [scorer.score_methods(setting).methods["semla"].miou for setting in settings]
    assert scorer.score_grid(settings) == pytest.approx(scores, abs=5e-3)


def test_without_an_own_adapter_there_is_no_oracle(bench, target):
    stranger = TargetDomain("city", "x", CLASSES, target.samples, target.load)
    result = TargetScorer(bench, stranger, ScoringConfig(late=False)).score_methods(SETTING)
    assert list(result.methods) == ["zero_shot", "uniform", "semla"]
    assert list(result.weights) == list(DOMAINS)


def test_refuses_a_domain_without_another_adapter(base, bench, target):
    alone = EvaluationContext(base, bench.entries[1:2], bench.load, measure)
    with pytest.raises(ConfigError, match="'fog': no other adapter"):
        TargetScorer(alone, target, ScoringConfig())


def test_refuses_images_without_masks_and_no_images(bench, target):
    unlabelled = [dataclasses.replace(sample, mask=None) for sample in target.samples]
    with pytest.raises(DatasetError, match="has no mask"):
        TargetScorer(
            bench, dataclasses.replace(target, samples=unlabelled), ScoringConfig()
        ).score_methods(SETTING)
    none = TargetDomain("fog", "x", CLASSES, (), target.load)
    with pytest.raises(DatasetError, match="no images"):
        TargetScorer(bench, none, ScoringConfig()).score_methods(SETTING)
