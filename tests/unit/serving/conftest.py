import pytest

from loraseg.backbones.clip import load_clip
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from loraseg.serving.config import Limits, ServiceConfig
from tests.unit.serving.api_client import ApiClient
from tests.unit.tiny import publish, write_models


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """The tiny models as files, and a library of four adapters for them."""
    folder = tmp_path_factory.mktemp("world")
    base, encoder = write_models(folder)
    publish(folder / "library", load_base(base), load_clip(encoder))
    return ServiceConfig(
        libraries={"main": str(folder / "library")},
        base=base,
        encoder=encoder,
        k=2,
        poll_s=0.2,
        # Busy machines are slow, which is not what these tests are about.
        limits=Limits(request_timeout_s=500.0),
    )


@pytest.fixture(scope="package")
def engine(world):
    with build_local_engine(world) as engine:
        assert engine.wait_until_ready(60.0)
        yield engine


@pytest.fixture(scope="package")
def open_talk(engine, world):
    return ApiClient(engine, world)


@pytest.fixture
def talk(open_talk):
    """Talks to an open API over the engine."""
    open_talk.contexts.clear()
    return open_talk
