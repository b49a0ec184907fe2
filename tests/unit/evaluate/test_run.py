import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loraseg.backbones.clip import load_clip
from loraseg.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError
from loraseg.evaluate.leave_one_out import ScoringConfig
from loraseg.evaluate.output import write_results
from loraseg.evaluate.run import (
    EvaluationConfig,
    EvaluationDomain,
    EvaluationTask,
    _load_models_once,
    evaluate,
)
from loraseg.evaluate.tuning import HyperparameterGrid, Hyperparameters
from loraseg.fuse import fuse
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.library import Library
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.storage import open_store
from tests.unit.tiny import (
    CLASSES,
    DOMAINS,
    ColorEncoder,
    domain_images,
    publish,
    write_domain,
    write_models,
)

FAMILIES = {"day": "bright", "fog": "bright", "night": "dark", "dusk": "dark"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def base(models):
    return load_base(models[0])


@pytest.fixture(scope="module")
def encoder(models):
    return load_clip(models[1])


@pytest.fixture
def config(tmp_path, models, base, encoder):
    publish(tmp_path / "library", base, encoder)
    domains = tuple(
        EvaluationDomain(
            name=name, data=str(write_domain(tmp_path / name, name)), family=FAMILIES[name]
        )
        for name in DOMAINS
    )
    return EvaluationConfig(
        library=str(tmp_path / "library"),
        base=models[0],
        encoder=models[1],
        output=str(tmp_path / "out"),
        domains=domains,
        grid=HyperparameterGrid(k=(1, 3), temperature=(0.3,)),
        scoring=ScoringConfig(late=False),
        lonely=("dusk",),
    )


def test_scores_every_domain_with_settings_from_the_other_fold(config):
    results = evaluate(config)
    folds, miou = results.tuning["folds"], results.tuning["miou"]
    assert [target.name for target in results.targets] == list(DOMAINS)
    assert folds["day"] == folds["fog"] != folds["night"] == folds["dusk"]
    for target in results.targets:
        others = [name for name in DOMAINS if folds[name] != folds[target.name]]
        means = [len(others) / sum(1 / miou[name][i] for name in others) for i in range(2)]
        assert target.setting.k == (1, 3)[means.index(max(means))]
        assert set(target.methods) == {"zero_shot", "uniform", "semla", "oracle"}


def test_equal_inputs_give_equal_bytes_in_any_order_of_execution(config, base):
    def reversed_map(function, tasks):
        return [function(task) for task in tasks[::-1]][::-1]

    first = evaluate(config)
    _load_models_once.cache_clear()
    second = evaluate(config, reversed_map)
    assert first.to_json() == second.to_json()
    content = json.loads(first.to_json())
    assert content["config"]["domains"][0]["name"] == "day"
    assert content["library_generation"] == 4
    assert content["base"]["digest"] == base.digest
    assert len(content["adapters"]["day"]["digest"]) == 64
    page = Path(write_results(first, config.output)).read_text()
    assert "night" in page


def test_fixed_settings_skip_the_grid(config):
    results = evaluate(replace(config, k=2, temperature=0.5))
    assert results.tuning == {}
    assert {target.setting for target in results.targets} == {Hyperparameters(k=2, temperature=0.5)}


def test_tasks_have_a_fixed_generation_and_absolute_paths(
    config, base, encoder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    relative = replace(
        config,
        library="library",
        domains=tuple(replace(domain, data=domain.name) for domain in config.domains),
    )
    recorded = []

    def recording_map(function, tasks):
        recorded.extend(tasks)
        publish(tmp_path / "library", base, encoder, names=("day",), parents=("ef" * 32,))
        monkeypatch.chdir("/")
        return [function(task) for task in tasks]

    evaluate(replace(relative, k=1, temperature=1.0), recording_map)
    assert {task.generation for task in recorded} == {4}
    assert all(isinstance(task, EvaluationTask) for task in recorded)
    assert recorded[0].config.library == str(tmp_path / "library")


def load(models, uri, **options):
    return load_models(SegmenterConfig(base=models[0], encoder=models[1], **options), uri)


def test_distances_are_euclidean_distances_to_the_centroids(config, models, encoder):
    loaded = load(models, config.library)
    images = list(domain_images("fog", 4))
    distances = loaded.distances(images)
    embeddings = encoder.encode_images(images).astype(np.float64)
    for column, entry in enumerate(loaded.pool.entries):
        [centroid] = loaded.snapshot.entries[entry.name].card.centroids
        naive = ((embeddings - centroid.vector) ** 2).sum(axis=1) ** 0.5
        assert distances[:, column] == pytest.approx(naive, abs=1e-12)
    assert loaded.distances([]).shape == (0, 4)


def test_adapters_are_fetched_once_per_machine(config, models, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    first = load(models, config.library)
    [entry, *_] = first.pool.entries
    fetched = first.pool.load(entry)
    monkeypatch.setattr(Library, "load_entry", lambda *_: pytest.fail("fetched again"))
    again = load(models, config.library).pool.load(entry)
    assert (again.digest, again.base_digest) == (entry.digest, entry.base_digest)
    for shape, block in fetched.blocks.items():
        assert torch.equal(block.up, again.blocks[shape].up)


def test_bfloat16_reaches_base_and_adapters(config, models):
    loaded = load(models, config.library, precision="bf16")
    packed = loaded.pool.load(loaded.pool.entries[0])
    assert loaded.base.dtype == torch.bfloat16
    assert {block.down.dtype for block in packed.blocks.values()} == {torch.bfloat16}
    mix = fuse([packed], [1.0])
    [scores] = Predictor(loaded.base).predict(list(domain_images("fog", 1)), CLASSES, mix)
    assert scores.dtype == torch.float32


def test_adapters_of_other_bases_and_roles_are_left_out(config, models):
    library = Library(open_store(config.library))
    files, card = library.load("day")
    library.publish("picture", files, replace(card, name="picture", role="generator"))
    other = replace(card.base, digest="ff" * 32)
    library.publish("other", files, replace(card, name="other", base=other))
    names = [entry.name for entry in load(models, config.library).pool.entries]
    assert names == ["day", "dusk", "fog", "night"]


def test_reason_for_an_empty_pool(tmp_path, models, base, encoder):
    assert "is empty" in load(models, str(tmp_path)).pool.empty_reason
    other = replace(base, name="large", digest="ff" * 32)
    publish(tmp_path, other, encoder, names=("day",))
    loaded = load(models, str(tmp_path))
    pool = loaded.pool
    assert pool.retriever is None
    assert pool.empty_reason == f"no adapter of library '{open_store(str(tmp_path)).uri}' fits"
    reason = loaded.snapshot.incompatible["day"]
    assert reason == f"trained on base ffffffffffff, expected {base.digest[:12]}"
    assert load(models, None).pool.entries == ()


@pytest.mark.parametrize("kind", ["active", "inert"])
def test_attention_follows_the_recipes(tmp_path, models, base, encoder, kind):
    publish(tmp_path, base, encoder, recipe={"clip_attention_lora": kind})
    for setting, expected in (("as_trained", kind), ("active", "active"), ("inert", "inert")):
        loaded = load(models, str(tmp_path), clip_attention_lora=setting)
        assert loaded.base.model.config.clip_attention_lora == expected
        assert loaded.base.digest == base.digest


def test_a_library_of_both_attention_kinds_follows_the_majority(tmp_path, models, base, encoder):
    for name, kind in (("day", "active"), ("fog", "inert"), ("night", "inert")):
        publish(tmp_path, base, encoder, names=(name,), recipe={"clip_attention_lora": kind})
    loaded = load(models, str(tmp_path))
    assert loaded.base.model.config.clip_attention_lora == "inert"
    assert [entry.name for entry in loaded.pool.entries] == ["fog", "night"]
    assert list(loaded.snapshot.incompatible) == ["day"]
    forced = load(models, str(tmp_path), clip_attention_lora="active")
    assert [entry.name for entry in forced.pool.entries] == ["day", "fog", "night"]


def test_adapters_of_another_encoder_are_refused(tmp_path, models, base):
    publish(tmp_path, base, ColorEncoder())
    with pytest.raises(AdapterMismatchError, match="no centroid of encoder"):
        load(models, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ()}, "at least one"),
        ({"lonely": ("nowhere",)}, "nowhere not among"),
        ({"k": 3}, "set both"),
    ],
)
def test_config_is_checked(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)
    with pytest.raises(ConfigError, match="day named twice"):
        replace(config, domains=config.domains[:1] * 2)


def test_unknown_candidates_are_named(config):
    with pytest.raises(AdapterNotFoundError, match=r"candidates absent: .*day, dusk"):
        evaluate(replace(config, candidates=("absent", "day")))
