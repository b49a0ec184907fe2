"""Tiny domains, a tiny base, and a manifest of them."""

import itertools

import pytest

import jobs.train_adapters as job
from loraseg import config as configuration
from tests.tiny_training import write_domain, write_manifest, write_models


@pytest.fixture(scope="session")
def domains(tmp_path_factory):
    """Folders by name: two valid ones, one with a truncated image, and a missing one."""
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
