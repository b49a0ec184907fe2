import typing

import pytest

from loraseg import config
from loraseg.errors import ConfigError
from loraseg.train.segmenter_adapters.recipes import (
    RECIPES,
    AdapterRecipe,
    DomainKind,
    named_recipe,
    semla,
)

# SemLA's training configs, copied by hand: batch, rate, iterations, weight decay, warm-up factor.
TABLE = """
acdc 2 1e-4 2000 1e-4 .01
muses 2 1e-5 3000 1e-4 .01
cs 4 1e-4 20000 1e-5 .01
bdd 4 1e-4 10000 1e-5 .01
mv 2 1e-4 6000 1e-5 .01
a150 4 1e-4 20000 1e-5 .1
idd 4 1e-4 20000 1e-5 .1
pc59 4 1e-4 4000 1e-5 .1
nyu 4 1e-4 4000 1e-5 .1
coconutL 4 1e-4 86154 1e-5 .1
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_semla_has_the_published_numbers(row):
    kind, *numbers = row.split()
    recipe = semla(kind)
    assert [
        recipe.batch_size,
        recipe.learning_rate,
        recipe.loop.steps,
        recipe.weight_decay,
        recipe.loop.warmup_factor,
    ] == [float(number) for number in numbers]
    assert (recipe.rank, recipe.alpha, recipe.loop.clip_norm) == (8, 16.0, 0.01)
    assert (recipe.loop.warmup_steps, recipe.augment.crop) == (1000, 384)
    assert recipe.resize == ((512, 1024) if kind == "cs" else None)
    assert recipe.clip_attention_lora == "active"
    assert not recipe.mask_ignored


def test_every_kind_has_a_name():
    assert {f"semla-{kind}" for kind in typing.get_args(DomainKind)} == set(RECIPES) - {
        "semla",
        "miniature",
    }
    for name in RECIPES:
        recipe = named_recipe(name)
        assert config.build(AdapterRecipe, config.to_dict(recipe)) == recipe


def test_overrides_reach_nested_fields_and_leave_the_rest():
    recipe = named_recipe("miniature", {"rank": 4, "loop": {"steps": 7}, "augment": {"flip": 0.0}})
    assert (recipe.rank, recipe.loop.steps, recipe.augment.flip) == (4, 7, 0.0)
    assert (recipe.augment.crop, recipe.loop.clip_norm) == (64, 1.0)


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("semlar", {}, r"recipe: got 'semlar', known: miniature, semla"),
        ("semla", {"learn_rate": 1}, "unknown key 'learn_rate'; did you mean 'learning_rate'"),
        ("semla", {"loop": {"stepz": 1}}, "unknown key 'loop.stepz'"),
        ("semla", {"rank": 0}, "rank: got 0"),
        ("semla", {"init": "zeros"}, "init: got 'zeros', known: lora"),
        ("semla", {"learning_rate": -1.0}, "learning_rate: got -1"),
        ("semla", {"weight_decay": -1.0}, "weight_decay: got -1"),
        ("semla", {"resize": [0, 5]}, "resize: got"),
        ("semla", {"targets": "all"}, "targets: got 'all', known: semla"),
        ("semla", {"clip_attention_lora": "on"}, "clip_attention_lora"),
    ],
)
def test_unknown_fields_and_values_out_of_range_are_refused(name, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        named_recipe(name, overrides)
