"""A sweep over one dataset on Ray: trained together, isolated failures, a repeated job."""

import dataclasses

import pytest

from actors.resources import ResourceConfig
from actors.train_adapters import train_adapters
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.tasks import train_adapter

pytestmark = pytest.mark.ray

SHARED = {"targets": "aggregator", "batch_size": 2, "loop": {"steps": 12, "checkpoint_every": 4}}


def sweep(config, **changes):
    """One task for each rank, and one whose loss diverges."""
    (task,) = config.tasks()
    recipes = {
        "one": {"rank": 1},
        "two": {"rank": 2},
        "wild": {"learning_rate": 1e38, "alpha": 1e8},
    }
    return [
        dataclasses.replace(
            task,
            name=name,
            recipe=named_recipe("miniature", SHARED, recipe),
            data_order="per_dataset",
            **changes,
        )
        for name, recipe in recipes.items()
    ]


def test_one_worker_trains_the_group_and_a_diverging_task_fails_alone(
    ray_cluster, make_manifest, tmp_path
):
    _, config = make_manifest("fog")
    tasks = sweep(config)
    outcomes = {o.name: o for o in train_adapters(tasks, ResourceConfig(max_parallel=1))}
    assert set(outcomes) == {"one", "two", "wild"}
    assert outcomes["wild"].error.startswith("StageError: step ")
    apart = sweep(config, library=str(tmp_path / "apart"))
    for task in apart[:2]:
        assert train_adapter(task).digest == outcomes[task.name].result.digest
    again = {o.name: o for o in train_adapters(tasks[:2], ResourceConfig(max_parallel=1))}
    assert all(outcome.result.skipped for outcome in again.values())
