"""Recipes of generators and the layers that they adapt."""

import math

import pytest

from loraseg import config
from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.unet import attention_projections, select_projections
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.train.generator_adapters.recipes import (
    GENERATOR_RECIPES,
    GeneratorRecipe,
    matchmask,
    matchmask_miniature,
    named_generator_recipe,
)
from loraseg.train.generator_adapters.targets import (
    absolute_targets,
    count_generator_parameters,
    generator_targets,
)
from tests.unit.tiny_diffusion import full_unet
from tests.unit.train.tiny_generator import tiny_generator


def test_matchmask_has_the_published_settings():
    recipe = matchmask()
    assert (recipe.targets, recipe.rank, recipe.alpha) == ("matchmask", 16, None)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch_size) == (4e-5, 1e-2, 4)
    assert (recipe.loop.steps, recipe.loop.schedule, recipe.loop.warmup_steps) == (
        100_000,
        "constant",
        0,
    )
    assert (recipe.view.size, recipe.view.fit) == ((512, 512), "resize")
    assert (recipe.draws.flip, recipe.draws.caption_dropout, recipe.draws.regions) == (0.5, 0, True)
    assert (recipe.fusion.mode, recipe.fusion.initial_bias) == ("token", -2.0)
    assert recipe.loss.weighting == "none"
    assert recipe.conditioning.template == "{classes}"


@pytest.mark.parametrize(
    ("unet", "pairs", "fusion"),
    [("sd1.4", 706_560, 4_810), ("sd2.1", 788_480, 4_810)],
)
def test_matchmask_trains_as_many_values_as_stated(unet, pairs, fusion):
    assert count_generator_parameters(full_unet(unet), matchmask()) == (pairs, fusion)


def test_the_count_follows_the_recipe():
    unet = tiny_generator().unet
    cross = named_generator_recipe("matchmask-miniature", {"rank": 3})
    values, fusion = count_generator_parameters(unet, cross)
    wide = [p for p in attention_projections(unet) if p.cross]
    assert values == 3 * sum(p.d_in + p.d_out for p in wide)
    assert fusion == sum(p.d_in + 1 for p in wide if p.part == "q")
    for off in ({"fusion": {"mode": "off"}}, {"draws": {"regions": False}}):
        recipe = named_generator_recipe("matchmask-miniature", {"rank": 3}, off)
        assert count_generator_parameters(unet, recipe) == (values, 0)
    alone = named_generator_recipe("matchmask-miniature", {"targets": "self"})
    assert count_generator_parameters(unet, alone)[1] == 0


def test_every_recipe_round_trips_through_plain_values():
    for name in GENERATOR_RECIPES:
        recipe = named_generator_recipe(name)
        assert recipe.name == name
        assert config.build(GeneratorRecipe, config.to_dict(recipe)) == recipe


@pytest.fixture
def report(tmp_path):
    projections = attention_projections(tiny_generator().unet)
    scores = tuple(
        LayerScore.from_projection(one, math.sin(index) ** 2, (0.5,))
        for index, one in enumerate(projections)
    )
    ordered = tuple(sorted(scores, key=lambda one: (-one.score, one.name)))
    written = LayerReport(
        method="gradient",
        base_name="tiny",
        base_digest="ab" * 32,
        scores=ordered,
        samples={"images": 4},
        settings={},
    )
    (tmp_path / "report.json").write_bytes(written.to_bytes())
    return str(tmp_path / "report.json"), [one.name for one in ordered]


def test_a_layer_report_gives_its_top_layers(report):
    place, ordered = report
    unet = tiny_generator().unet
    top = named_generator_recipe("matchmask-miniature", {"targets": place, "top": 5})
    assert list(generator_targets(unet, top)) == ordered[:5]
    share = named_generator_recipe("matchmask-miniature", {"targets": place, "share": 0.1})
    assert list(generator_targets(unet, share)) == ordered[: round(0.1 * len(ordered))]


def test_a_layer_report_needs_top_or_share(report):
    recipe = named_generator_recipe("matchmask-miniature", {"targets": report[0]})
    with pytest.raises(ConfigError, match="needs top or share"):
        generator_targets(tiny_generator().unet, recipe)


def test_full_names_are_used_unchanged():
    unet = tiny_generator().unet
    names = select_projections(unet, "all")[3:5]
    recipe = named_generator_recipe("matchmask-miniature", {"targets": list(names)})
    assert generator_targets(unet, recipe) == names


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"targets": "matchmasc"}, ConfigError, "neither a rule"),
        ({"targets": "/absent/matchmasc", "top": 1}, ConfigError, "neither a rule"),
        ({"targets": "cross", "top": 3}, ConfigError, "expected null unless"),
        ({"targets": ["no.layer"]}, AdapterMismatchError, "no linear layer 'no.layer'"),
        ({"targets": ["conv_in"]}, AdapterMismatchError, "no linear layer 'conv_in'"),
        (
            {"targets": ["time_embedding.linear_1"] * 2},
            AdapterMismatchError,
            "named twice",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(changes, error, reason):
    recipe = named_generator_recipe("matchmask-miniature", changes)
    with pytest.raises(error, match=reason):
        generator_targets(tiny_generator().unet, recipe)


def test_the_path_of_a_report_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_targets("cross") == "cross"
    assert absolute_targets(("a", "b")) == ("a", "b")
    assert absolute_targets("report.json") == str(tmp_path.resolve() / "report.json")
    assert absolute_targets("s3://bucket/report.json") == "s3://bucket/report.json"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"accumulate": 99}, "accumulate: got 99, expected at most batch_size 16"),
        ({"learning_rate": 0.0}, "learning_rate: got 0"),
        ({"alpha": -1.0}, "alpha: got -1"),
        ({"weight_decay": -1.0}, "weight_decay: got -1"),
        ({"targets": ""}, "targets: got none"),
        ({"fusion": {"mode": "on"}}, "fusion.mode"),
        ({"grid": {"every": -1}}, "grid: every -1"),
        ({"grid": {"guidance": 0.5}}, "grid.guidance: got 0.5, expected at least 1"),
        ({"loop": {"schedule": "linear"}}, "loop.schedule"),
        ({"view": {"sise": [8, 8]}}, "did you mean 'view.size'"),
    ],
)
def test_invalid_settings_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        named_generator_recipe("matchmask-miniature", changes)


def test_unknown_recipes_are_refused():
    with pytest.raises(ConfigError, match="known: matchmask, matchmask-miniature"):
        named_generator_recipe("matchmaks")


def test_the_miniature_recipe_is_short():
    recipe = matchmask_miniature()
    assert (recipe.rank, recipe.targets, recipe.batch_size) == (16, "cross", 16)
    assert (recipe.view.size, recipe.loop.schedule) == ((64, 64), "cosine")
    assert recipe.loop.steps <= 500
