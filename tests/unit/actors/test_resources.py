"""Ranges of resource configs, and S3 settings of workers. No Ray is started."""

import os

import pytest

from actors.executor import ActorPoolConfig
from actors.resources import ResourceConfig, StorageCredentials
from loraseg.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cpus": 0}, "cpus > 0"),
        ({"gpus": -1}, "gpus >= 0"),
        ({"max_parallel": 0}, "max_parallel must be >= 1, got 0"),
        ({"retries": -1}, "retries must be >= 0, got -1"),
    ],
)
def test_ranges(values, message):
    with pytest.raises(ConfigError, match=message):
        ResourceConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_parallel": 0}, "min_parallel must be >= 1, got 0"),
        ({"min_parallel": 3, "max_parallel": 2}, "min_parallel <= max_parallel, got 3 and 2"),
        ({"cpus": 0}, "cpus > 0"),
    ],
)
def test_ranges_of_pools(values, message):
    with pytest.raises(ConfigError, match=message):
        ActorPoolConfig(**values)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2.9, 2), (8, 8)])
def test_threads_are_the_whole_cpus_and_at_least_one(cpus, threads):
    assert ResourceConfig(cpus=cpus).threads == threads


def test_short_description():
    assert str(ResourceConfig(cpus=2, gpus=0.5, node="trainer")) == "2 CPU, 0.5 GPU on trainer"


def test_only_store_settings_are_exported(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9")
    monkeypatch.setenv("AWS_PROFILE", "laptop-only")
    access = StorageCredentials.from_environment()
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name)
    access.export()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "hidden"
    assert os.environ["AWS_ENDPOINT_URL"] == "http://localhost:9"
    assert "AWS_PROFILE" not in os.environ


def test_secrets_are_not_in_the_representation(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    assert "hidden" not in repr(StorageCredentials.from_environment())
