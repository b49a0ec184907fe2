"""The launcher's own offline checks on cluster.yaml; no cloud is called."""

from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def raw():
    return yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))


def test_the_launcher_accepts_the_file():
    validate_config(prepare_config(raw()))


def test_the_check_would_see_a_misspelt_node_key():
    broken = raw()
    broken["available_node_types"]["trainer"]["min_worker"] = 0
    with pytest.raises(ValidationError, match="min_worker"):
        validate_config(prepare_config(broken))


def test_every_worker_type_starts_from_zero_and_only_the_head_is_always_there():
    config = prepare_config(raw())
    types = config["available_node_types"]
    assert set(types) == {"head", "trainer", "generator", "server"}
    assert all(types[name]["min_workers"] == 0 for name in types)
    assert types["head"]["resources"] == {"CPU": 0}


def test_work_that_resumes_runs_on_spot_and_people_are_served_on_demand():
    types = raw()["available_node_types"]
    spot = {name for name in types if "InstanceMarketOptions" in types[name]["node_config"]}
    assert spot == {"trainer", "generator"}


def test_the_environment_of_the_image_is_active_before_ray_starts():
    home = next(
        line.split()[-1]
        for line in (CLUSTER.parent / "Dockerfile").read_text().splitlines()
        if line.startswith("RUN python -m venv")
    )
    config = raw()
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(f". {home}/bin/activate && ")
