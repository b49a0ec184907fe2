import shutil

import pytest

from loraseg.backbones.clip import load_clip
from loraseg.segment.open_vocabulary.base import load_base
from tests.unit.tiny import publish, write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def base(models):
    return load_base(models[0])


@pytest.fixture(scope="session")
def encoder(models):
    return load_clip(models[1])


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def published(tmp_path_factory, base, encoder):
    folder = tmp_path_factory.mktemp("published") / "library"
    publish(folder, base, encoder)
    return folder


@pytest.fixture
def folder(tmp_path, published, own_cache):
    """A copy of a library of four adapters that a test may damage."""
    return shutil.copytree(published, tmp_path / "library")
