"""Run the endpoint in the foreground: start Serve, wait until it is ready, drain at the end."""

import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import ray
from ray import serve

from actors.resources import connect
from actors.serve.app import build_app
from actors.serve.logs import LOGGING
from actors.serve.proxy_errors import CALLBACK
from loraseg.errors import ConfigError, StageError
from loraseg.serving.config import ServiceConfig

__all__ = ["ListenAddress", "serve_until_signal"]

logger = logging.getLogger(__name__)

_APP_NAME = "loraseg"
# Workers of a Ray that is started here do not give way to whatever else the machine does.
_RAY_WORKER_ENV = {"RAY_worker_niceness": "0"}
_POLL_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where the proxies listen; port 0 stands for any free one."""

    host: str
    port: int

    def with_free_port(self) -> "ListenAddress":
        """Return it with a port that was free a moment ago.

        Raises:
            ConfigError: The port is taken, or the host is none of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ConfigError(f"{self.host} port {self.port}: {error.strerror}") from error
            return ListenAddress(self.host, probe.getsockname()[1])

    @property
    def url(self) -> str:
        """What a browser on this machine opens."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serve_until_signal(
    config: ServiceConfig, address: ListenAddress, on_ready: Callable[[str], None]
) -> int:
    """Serve until SIGINT or SIGTERM, then let running requests finish.

    Args:
        config: What is served; fields of subclasses are not looked at.
        address: Where.
        on_ready: Called with the URL once models and catalogs are loaded.

    Returns:
        Exit status: 0.

    Raises:
        ConfigError: The port is taken, or a field is wrong.
        StageError: The application does not start.
    """
    config = ServiceConfig(**{f.name: getattr(config, f.name) for f in fields(ServiceConfig)})
    address = address.with_free_port()
    for name, value in {**CALLBACK, **_RAY_WORKER_ENV}.items():
        os.environ.setdefault(name, value)
    is_ours = connect(cpus=_cpus(config))
    told = _StopSignal()  # after Ray, which sets its own handlers
    try:
        _start(config, address)
        if _wait_ready(address, told):
            on_ready(address.url)
            told.wait()
        logger.info("letting running requests finish")
        _drain(config.limits.request_timeout_s)
    finally:
        _shut_down(is_ours)
    return 0


class _StopSignal:
    """Whether somebody asked to stop; a second time ends at once, as usual."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._event.set()
        signal.signal(number, signal.SIG_DFL)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for it; return whether it was."""
        return self._event.wait(timeout_s)


def _start(config: ServiceConfig, address: ListenAddress) -> None:
    serve.start(http_options={"host": address.host, "port": address.port}, logging_config=LOGGING)
    try:
        serve.run(build_app(config), name=_APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise StageError(f"the service does not start: {error}") from error


def _wait_ready(address: ListenAddress, stop_signal: _StopSignal) -> bool:
    """Wait for models and catalogs; return False if told to stop meanwhile."""
    said: list[str] = []
    while not stop_signal.wait(_POLL_INTERVAL_S):
        waiting = _pending_components(address.url)
        if not waiting:
            return True
        if waiting != said:
            logger.info("waiting for %s", ", ".join(waiting))
            said = waiting
    return False


def _pending_components(url: str) -> list[str]:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=30):
            return []
    except urllib.error.HTTPError as error:
        with error:
            state = json.loads(error.read() or b"{}")
        return state.get("waiting_for") or ["the gateway"]
    except (OSError, ValueError):
        return ["the gateway"]


def _drain(timeout_s: float) -> None:
    """Refuse new requests and wait for those in work."""
    until = time.monotonic() + timeout_s
    gateway: Any = serve.get_deployment_handle("Gateway", _APP_NAME)
    while time.monotonic() < until:
        try:
            in_work = gateway.broadcast("drain").results(timeout_s=5)
        except Exception as error:  # noqa: BLE001  replicas that are gone have nothing in work
            logger.info("a gateway does not answer: %s", type(error).__name__)
            return
        if not sum(in_work):
            return
        time.sleep(_POLL_INTERVAL_S)


def _shut_down(started_here: bool) -> None:
    serve.shutdown()
    if started_here:
        ray.shutdown()


def _cpus(config: ServiceConfig) -> int:
    """Return how many CPUs a Ray of our own must offer; laptops have fewer, and share them."""
    placements = (config.gateway, config.retrieval, config.segmenter)
    needed = sum(each.cpus * each.max_replicas for each in placements)
    return max(os.cpu_count() or 1, int(-(-needed // 1)))
