"""Task digests decide what is skipped and resumed: they must never change for an existing task."""

import hashlib
import json

import pytest

from loraseg.probes.gradient import GradientProbeConfig
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.train.base_segmenter import TRAINING_FORMAT as BASE_FORMAT
from loraseg.train.base_segmenter import BaseRecipe
from loraseg.train.closed_set.data_spec import TrainingDataDigests
from loraseg.train.closed_set.job import _run_digest
from loraseg.train.closed_set.recipes import named_segmenter_recipe
from loraseg.train.core.task_digest import task_digest
from loraseg.train.generator_adapters import job as generator_job
from loraseg.train.generator_adapters.recipes import named_generator_recipe
from loraseg.train.segmenter_adapters import job as segmenter_job
from loraseg.train.segmenter_adapters.recipes import named_recipe

DATA, BASE, OTHER = "1f" * 32, "2e" * 32, "3d" * 32


def generator_parts(active):
    recipe = named_generator_recipe("matchmask-miniature")
    return {
        "name": "fog",
        "seed": 7,
        "data_order": "per_dataset",
        "recipe": generator_job._canonical_recipe(recipe, ("a.to_q", "b.to_k")),
        "training_digest": DATA,
        "base_digest": BASE,
        "active": active,
    }


def segmenter_parts():
    return {
        "name": "fog",
        "seed": 7,
        "data_order": "per_adapter",
        "encoder": "clip",
        "recipe": segmenter_job._canonical_recipe(named_recipe("semla-cs")),
        "training_digest": DATA,
        "base_digest": BASE,
    }


# Computed by the code that trained the adapters published before this function existed.
PINNED = {
    "base": "03138044f2cbdc066e370f86dcc29b0e76fd7d90063badd7c1a456e9ce1e58f7",
    "segmenter": "b037ae358ca8fb0a413cb909327ee2b1f6f702adcbb2e457d9201e88b3738fcd",
    "generator": "c279d8e9998be0777068d42ca4aab540d97ef3f92f283468cf1f4d28f21592d0",
    "generator with an active adapter": (
        "e198d0b4da55033fe4ec9f320a6049823711f65a76576c3f6b7d72d51542100b"
    ),
    "probe": "15cc64e24eace2e925d3bfaf23d47acce9b2620a53c607323148f6e997510c08",
}
PARTS = {
    "base": (
        BASE_FORMAT,
        {"seed": 7, "recipe": BaseRecipe(), "training_digest": DATA, "base_digest": BASE},
    ),
    "segmenter": (segmenter_job.TRAINING_FORMAT, segmenter_parts()),
    "generator": (generator_job.GENERATOR_FORMAT, generator_parts(())),
    "generator with an active adapter": (
        generator_job.GENERATOR_FORMAT,
        generator_parts(((OTHER, 0.5),)),
    ),
    "probe": (
        1,
        {
            "method": "gradient",
            "base_digest": BASE,
            "data_digest": DATA,
            "size": (64, 32),
            "flip": 0.5,
            "conditioning": ConditioningConfig(),
            "gradient": GradientProbeConfig(),
            "seed": 7,
        },
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_digests_of_existing_tasks_do_not_change(name):
    assert task_digest(*PARTS[name]) == PINNED[name]


@pytest.mark.parametrize(
    ("synthetic", "expected"),
    [
        ((OTHER,), "012991ca81ffdd4aee784a8e8ebdd5e0b2d8d8842046fe24647a26630a059c25"),
        ((), "59ea8282619256e8daae600c91d37c8abb2685878ffeeb14bd34df8191fcf6a4"),
    ],
)
def test_digests_of_existing_closed_set_runs_do_not_change(synthetic, expected):
    digests = TrainingDataDigests(real=DATA, val=BASE, synthetic=synthetic)
    assert _run_digest(named_segmenter_recipe("unet-miniature"), 7, digests) == expected


@pytest.mark.parametrize(("compact", "separators"), [(True, (",", ":")), (False, (", ", ": "))])
def test_a_digest_is_the_sha256_of_sorted_json(compact, separators):
    parts = {"name": "fog", "weights": (0.5, 1.0)}
    content = {"format": 4, "name": "fog", "weights": [0.5, 1.0]}
    text = json.dumps(content, sort_keys=True, separators=separators)
    assert task_digest(4, parts, compact=compact) == hashlib.sha256(text.encode()).hexdigest()
