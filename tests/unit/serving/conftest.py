import pytest

from loraseg.backbones.clip import load_clip
from loraseg.segment.base import load_base
from loraseg.serving.build import build_local
from loraseg.serving.config import ServiceConfig
from tests.unit.serving.talking import Talk
from tests.unit.tiny import publish, write_models


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """The tiny models as files, and a library of four adapters for them."""
    folder = tmp_path_factory.mktemp("world")
    base, encoder = write_models(folder)
    publish(folder / "library", load_base(base), load_clip(encoder))
    return ServiceConfig(
        libraries={"main": str(folder / "library")}, base=base, encoder=encoder, k=2, poll_s=0.2
    )


@pytest.fixture(scope="package")
def engine(world):
    with build_local(world) as engine:
        assert engine.wait_until_ready(60.0)
        yield engine


@pytest.fixture
def talk(engine, world):
    """Talks to an open API over the engine."""
    return Talk(engine, world)
