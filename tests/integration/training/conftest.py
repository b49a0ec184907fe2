"""Tiny domains, a tiny base, a manifest of them, and nodes that come and go."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

import jobs.train_adapters as job
from loraseg import config as configuration
from tests.integration.ray_cluster import end_starter
from tests.tiny_world import write_domain, write_manifest, write_models


@pytest.fixture(scope="session")
def domains(tmp_path_factory):
    """Folders by name: two good ones, one with a truncated image, and one that is not there."""
    root = tmp_path_factory.mktemp("domains")
    folders = {name: write_domain(root / name, name) for name in ("fog", "night")}
    broken = write_domain(root / "broken", "fog")
    image = broken / "images" / "train" / "0.png"
    image.write_bytes(image.read_bytes()[:100])
    return {**folders, "broken": broken, "absent": root / "absent"}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_manifest(tmp_path, domains, tiny_models):
    """Return a function: domain names -> (manifest file, its config), each with its own stores.

    The stores lie below ``uri`` if one is given.
    """
    numbers = itertools.count()

    def make(*names, uri=None):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        data = {name: domains[name] for name in names}
        manifest = write_manifest(folder / "manifest.yaml", uri or str(folder), data, **tiny_models)
        return manifest, configuration.load(job.Config, manifest)

    return make


@pytest.fixture
def extra_nodes(ray_cluster):
    """Return a context manager that adds nodes with a custom resource to the cluster."""

    @contextlib.contextmanager
    def add(count, *, resource):
        ray_command = str(Path(sys.executable).with_name("ray"))
        command = [ray_command, "start", "--block", f"--address={ray_cluster.address}"]
        command += ["--num-cpus=1", f"--resources={json.dumps({resource: 1})}"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0"]
        command += ["--max-worker-port=0", "--disable-usage-stats"]
        starters = []
        try:
            # One after the other: two that start at once may pick the same free port.
            for number in range(1, count + 1):
                starters.append(subprocess.Popen(command, env=ray_cluster.environment))
                wait_for_resource(resource, number)
            yield
        finally:
            for starter in starters:
                end_starter(starter)

    return add


def wait_for_resource(name, amount, deadline_s=90):
    deadline = time.monotonic() + deadline_s
    while ray.cluster_resources().get(name, 0) < amount:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {amount} nodes with {name!r} came up in {deadline_s} s")
        time.sleep(0.2)
