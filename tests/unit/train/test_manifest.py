"""From a manifest to tasks."""

from pathlib import Path

import pytest

from loraseg import config as configuration
from loraseg.errors import ConfigError
from loraseg.storage import absolute_uri
from loraseg.train.generator_adapters.task import ActiveAdapter
from loraseg.train.manifest import TrainingManifest
from loraseg.train.tasks import GeneratorAdapterTask, SegmenterAdapterTask, group_tasks


def manifest(**changes):
    values = {
        "library": "s3://bucket/library",
        "checkpoints": "state",
        "images": 8,
        "domains": [
            {"name": "fog", "data": "data/fog"},
            {"name": "rain", "data": "s3://bucket/rain", "images": 3, "split": "all"},
        ],
    }
    return configuration.build(TrainingManifest, {**values, **changes})


def test_a_domain_overrides_the_common_settings():
    fog, rain = manifest().tasks()
    assert (fog.images, fog.split) == (8, "train")
    assert (rain.images, rain.split) == (3, "all")


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.safetensors").touch()
    fog, rain = manifest(base="base.safetensors").tasks()
    assert fog.data == str(tmp_path.resolve() / "data" / "fog")
    assert fog.checkpoints == str(tmp_path.resolve() / "state")
    assert fog.base == str(tmp_path.resolve() / "base.safetensors")
    assert (rain.data, rain.library) == ("s3://bucket/rain", "s3://bucket/library")


def test_names_of_models_are_not_paths():
    fog, _ = manifest(encoder="ViT-L-14/openai").tasks()
    assert (fog.base, fog.encoder) == ("miniature", "ViT-L-14/openai")


def test_a_home_folder_is_expanded():
    assert absolute_uri("~/library") == str(Path.home() / "library")


def test_fields_of_the_recipe_can_be_set():
    fog, _ = manifest(recipe="semla", overrides={"rank": 4, "loop": {"steps": 7}}).tasks()
    assert (fog.recipe.rank, fog.recipe.loop.steps) == (4, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": []}, "at least one, got none"),
        ({"domains": [{"name": "fog", "data": "a"}] * 2}, "got fog more than once"),
        ({"recipe": "simla"}, "got 'simla', known: miniature"),
        ({"overrides": {"rnk": 4}}, "unknown key 'rnk'; did you mean 'rank'"),
        ({"domains": [{"name": "fog", "dat": "a"}]}, "did you mean 'domains.0.data'"),
    ],
)
def test_mistakes_are_reported(changes, message):
    with pytest.raises(ConfigError, match=message):
        manifest(**changes).tasks()


def test_a_sweep_over_one_dataset_is_a_manifest_of_overrides():
    shared = {"targets": "aggregator", "loop": {"steps": 9, "warmup_steps": 2}}
    domains = [
        {"name": "small", "data": "fog", "overrides": {"rank": 2}},
        {"name": "long", "data": "fog", "overrides": {"loop": {"steps": 20}}},
    ]
    small, long = manifest(overrides=shared, domains=domains, data_order="per_dataset").tasks()
    assert (small.recipe.rank, small.recipe.loop.steps) == (2, 9)
    assert (long.recipe.rank, long.recipe.loop.steps) == (8, 20)
    assert long.recipe.loop.warmup_steps == 2
    assert group_tasks((small, long), max_size=2) == [(0, 1)]


def test_the_role_selects_the_task_class():
    assert all(isinstance(task, SegmenterAdapterTask) for task in manifest().tasks())
    fog, rain = manifest(role="generator").tasks()
    assert isinstance(fog, GeneratorAdapterTask)
    assert (fog.recipe.name, fog.base, fog.images) == ("matchmask-miniature", "miniature", 8)
    assert (rain.split, rain.data) == ("all", "s3://bucket/rain")
    assert fog.report_uri == f"{fog.checkpoints}/_reports"
    assert fog.cache_uri == f"{fog.checkpoints}/_cache"


def test_paths_of_a_generator_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").touch()
    fog, _ = manifest(
        role="generator",
        base="sd",
        recipe="matchmask",
        cache="cache",
        output="s3://bucket/reports",
        overrides={"targets": "layers.json", "top": 40},
        active=[{"name": "style"}],
    ).tasks()
    here = tmp_path.resolve()
    assert (fog.base, fog.cache) == (str(here / "sd"), str(here / "cache"))
    assert (fog.output, fog.recipe.targets) == ("s3://bucket/reports", str(here / "layers.json"))
    assert fog.active == (ActiveAdapter(name="style"),)
    assert {fog.base, fog.cache, fog.output} < set(fog.required_uris())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "reports"}, "for role generator only"),
        ({"role": "generator", "recipe": "semla"}, "got 'semla', known: matchmask"),
        ({"role": "generator", "overrides": {"rnk": 4}}, "unknown key 'rnk'; did you mean 'rank'"),
        ({"role": "generator", "active": [{"name": "A"}]}, "active: "),
        ({"role": "painter"}, "role"),
    ],
)
def test_mistakes_about_roles_are_reported(changes, message):
    with pytest.raises(ConfigError, match=message):
        manifest(**changes).tasks()
