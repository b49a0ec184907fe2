"""S3 servers and one Ray for all integration tests.

``s3_env``: a fresh bucket on moto, which needs nothing and forgets everything.
``durable_env``: a fresh bucket on the durable server that LORASEG_TEST_S3_ENDPOINT names (with
LORASEG_TEST_S3_ACCESS_KEY and _SECRET_KEY, or the usual AWS variables); skipped without it.
``store_uri``: an empty store of each kind.
"""

import os
import subprocess
import sys

import pytest

from tests.integration.ray_cluster import ray_cluster
from tests.integration.s3_endpoint import S3Endpoint, S3Space

# Here and nowhere else: a fixture that two modules import is two fixtures, and so two clusters.
__all__ = ["ray_cluster"]

_AWS_SETTINGS = ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN")
# A process of its own: moto patches nothing here, and Ray workers can reach it.
# Between the check of a conditional write and the write moto lets other threads write: on a busy
# machine two of them win the same race, which no real server allows.
_SERVE_MOTO = """
import sys
import threading
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

def one_at_a_time(method, lock=threading.Lock()):
    def locked(*arguments, **named):
        with lock:
            return method(*arguments, **named)
    return locked

for name in ("put_object", "_key_response_post"):
    setattr(S3Response, name, one_at_a_time(getattr(S3Response, name)))
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def moto_endpoint():
    """A moto server on a free port. It checks no credentials and keeps everything in memory."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE_MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        port = server.stdout.readline().strip()
        assert port.isdigit(), "moto did not start; run `python -m moto.server` to see why"
        yield S3Endpoint(f"http://127.0.0.1:{port}", "testing", "testing")
        server.kill()


@pytest.fixture(scope="session")
def durable_endpoint():
    """The durable server that the environment names."""
    url = os.environ.get("LORASEG_TEST_S3_ENDPOINT")
    if not url:
        pytest.skip(
            "no durable S3 server: set LORASEG_TEST_S3_ENDPOINT, or run .ci/durable_tests.sh"
        )
    return S3Endpoint(
        url,
        os.environ.get("LORASEG_TEST_S3_ACCESS_KEY") or os.environ["AWS_ACCESS_KEY_ID"],
        os.environ.get("LORASEG_TEST_S3_SECRET_KEY") or os.environ["AWS_SECRET_ACCESS_KEY"],
        os.environ.get("LORASEG_TEST_S3_RESTART"),
    )


@pytest.fixture
def s3_env(moto_endpoint, monkeypatch):
    """A fresh bucket on moto, with the environment set to reach it."""
    return _fresh_space(moto_endpoint, monkeypatch)


@pytest.fixture
def durable_env(durable_endpoint, monkeypatch):
    """A fresh bucket on the durable server, with the environment set to reach it."""
    return _fresh_space(durable_endpoint, monkeypatch)


@pytest.fixture(params=["file", "moto", pytest.param("durable", marks=pytest.mark.durable)])
def store_uri(request, tmp_path):
    """The URI of an empty store of each kind, below a prefix with a blank in it."""
    if request.param == "file":
        return (tmp_path / "a store").as_uri()
    space = request.getfixturevalue("s3_env" if request.param == "moto" else "durable_env")
    return f"{space.uri}/a store"


def _fresh_space(endpoint, monkeypatch):
    for name in _AWS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    return S3Space(endpoint, endpoint.create_bucket())
