"""What every test relies on."""

import os

import pytest

# Two cores: one torch thread a process leaves room for Ray workers and the S3 server.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from loraseg.compat import prepare_torchvision

prepare_torchvision()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what is cached out of the user's folder; processes that tests start inherit it."""
    before = os.environ.get("LORASEG_CACHE")
    os.environ["LORASEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["LORASEG_CACHE"]
    else:
        os.environ["LORASEG_CACHE"] = before
