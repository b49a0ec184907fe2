"""Offline checks of cluster.yaml by the Ray cluster launcher; no cloud is called."""

from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def read_cluster():
    return yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))


def test_the_launcher_accepts_the_file():
    validate_config(prepare_config(read_cluster()))


def test_the_check_rejects_a_misspelt_node_key():
    broken = read_cluster()
    broken["available_node_types"]["trainer"]["min_worker"] = 0
    with pytest.raises(ValidationError, match="min_worker"):
        validate_config(prepare_config(broken))


def test_only_the_head_node_is_permanent():
    config = prepare_config(read_cluster())
    types = config["available_node_types"]
    assert set(types) == {"head", "trainer", "generator", "server"}
    assert all(types[name]["min_workers"] == 0 for name in types)
    assert types["head"]["resources"] == {"CPU": 0}


def test_training_nodes_are_spot_instances_and_server_nodes_are_not():
    types = read_cluster()["available_node_types"]
    spot = {name for name in types if "InstanceMarketOptions" in types[name]["node_config"]}
    assert spot == {"trainer", "generator"}


def test_the_environment_of_the_image_is_activated_before_ray_starts():
    venv = next(
        line.split()[-1]
        for line in (CLUSTER.parent / "Dockerfile").read_text().splitlines()
        if line.startswith("RUN python -m venv")
    )
    config = read_cluster()
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(f". {venv}/bin/activate && ")
