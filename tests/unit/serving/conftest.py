import pytest

from loraseg.backbones.clip import load_clip
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from loraseg.serving.config import Limits, ServiceConfig
from tests.unit.serving.api_client import ApiClient
from tests.unit.tiny import publish, write_models


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    """A service with the tiny models and a library of four adapters."""
    folder = tmp_path_factory.mktemp("service")
    base, encoder = write_models(folder)
    publish(folder / "library", load_base(base), load_clip(encoder))
    return ServiceConfig(
        libraries={"main": str(folder / "library")},
        base=base,
        encoder=encoder,
        k=2,
        poll_s=0.2,
        # These tests do not measure time, and the machine may be busy.
        limits=Limits(request_timeout_s=500.0),
    )


@pytest.fixture(scope="package")
def engine(config):
    with build_local_engine(config) as engine:
        assert engine.wait_until_ready(60.0)
        yield engine


@pytest.fixture(scope="package")
def shared_api(engine, config):
    return ApiClient(engine, config)


@pytest.fixture
def api(shared_api):
    """A client of an API without tokens."""
    shared_api.contexts.clear()
    return shared_api
