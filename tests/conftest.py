"""Settings and fixtures of all tests."""

import os

import pytest

# One torch thread per process leaves room for Ray workers and the S3 server on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from loraseg.compat import prepare_torchvision

prepare_torchvision()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Set a cache folder for the tests and the processes that they start."""
    before = os.environ.get("LORASEG_CACHE")
    os.environ["LORASEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["LORASEG_CACHE"]
    else:
        os.environ["LORASEG_CACHE"] = before
