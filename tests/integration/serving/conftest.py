"""An endpoint with tiny models on a local Ray cluster, one per module."""

import contextlib
import os
import socket
import time
import uuid
from dataclasses import dataclass

import httpx2 as httpx
import psutil
import pytest
from ray import serve

from actors.serve.app import build_app
from actors.serve.proxy_errors import CALLBACK
from loraseg.backbones.clip import load_clip
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.config import Limits, ReplicaConfig, ServiceConfig
from tests.unit.tiny import DOMAINS, domain_images, publish, write_models

# The proxies read this when Ray is started, once for all tests.
os.environ.update(CALLBACK)

_START_TIMEOUT_S = 120
_NO_CPUS = ReplicaConfig(cpus=0.0)


@dataclass(frozen=True)
class Service:
    """A running endpoint."""

    name: str
    url: str
    config: ServiceConfig

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def async_client(self):
        return httpx.AsyncClient(base_url=self.url, timeout=60)

    def replicas(self, deployment):
        """Return the processes of a deployment's replicas."""
        title = f"ray::ServeReplica:{self.name}:{deployment}"
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if (process.info["cmdline"] or [""])[0].startswith(title)
        ]

    def wait_ready(self, deadline_s=_START_TIMEOUT_S):
        deadline = time.monotonic() + deadline_s
        with self.client() as client:
            while (state := client.get("/readyz")).status_code != 200:
                assert time.monotonic() < deadline, state.text
                time.sleep(0.2)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def images():
    """Two images of each domain, which select different adapters."""
    return [image for name in DOMAINS for image in domain_images(name, 2)]


@pytest.fixture(scope="module")
def library(tmp_path_factory, models):
    """The folder of a library with four adapters."""
    folder = tmp_path_factory.mktemp("served") / "library"
    publish(folder, load_base(models[0]), load_clip(models[1]))
    return folder


@pytest.fixture(scope="session")
def serve_port(ray_cluster):
    """Start Serve's proxy on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def start(serve_port, models):
    """Returns a context manager that runs a service of some libraries with a config."""

    @contextlib.contextmanager
    def started(libraries, **options):
        config = ServiceConfig(
            libraries={name: str(uri) for name, uri in libraries.items()},
            base=models[0],
            encoder=models[1],
            **{
                "poll_s": 0.2,
                "temperature": 3.0,
                "k": 2,
                "gateway": _NO_CPUS,
                "retrieval": _NO_CPUS,
                "segmenter": _NO_CPUS,
                **options,
            },
        )
        name = f"loraseg-{uuid.uuid4().hex[:8]}"
        serve.run(build_app(config), name=name, route_prefix="/")
        service = Service(name, f"http://127.0.0.1:{serve_port}", config)
        try:
            service.wait_ready()
            yield service
        finally:
            serve.delete(name)

    return started


@pytest.fixture(scope="module")
def service(start, library):
    with start({"main": library}, limits=Limits(request_timeout_s=30.0)) as running:
        yield running
