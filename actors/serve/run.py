"""Run the endpoint on Ray Serve in the foreground, and drain it before the end."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from actors.resources import connect
from actors.serve.app import build_app
from actors.serve.logs import LOGGING
from actors.serve.proxy_errors import CALLBACK
from loraseg.errors import StageError
from loraseg.serving.config import ServiceConfig
from loraseg.serving.listen import ListenAddress, ServeConfig, StopSignal

__all__ = ["serve_until_signal"]

logger = logging.getLogger(__name__)

_APP_NAME = "loraseg"
# Ray lowers the priority of its workers by default.
_RAY_WORKER_ENV = {"RAY_worker_niceness": "0"}
_POLL_INTERVAL_S = 0.5


def serve_until_signal(serve_config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish running requests.

    Args:
        serve_config: The endpoint and its address.
        on_ready: Called with the URL when models and catalogs are loaded.

    Raises:
        ConfigError: The port is in use, or a field is wrong.
        StageError: The application does not start.
    """
    address = serve_config.address().with_free_port()
    config = serve_config.service()
    for name, value in {**CALLBACK, **_RAY_WORKER_ENV}.items():
        os.environ.setdefault(name, value)
    is_ours = connect(cpus=_cpus(config))
    stop_signal = StopSignal()  # after Ray, which sets its own handlers
    try:
        _start(config, address)
        if _wait_ready(address, stop_signal):
            on_ready(address.url)
            stop_signal.wait()
        logger.info("finishing running requests")
        _drain(config.limits.request_timeout_s)
    finally:
        _shut_down(is_ours)


def _start(config: ServiceConfig, address: ListenAddress) -> None:
    serve.start(http_options={"host": address.host, "port": address.port}, logging_config=LOGGING)
    try:
        serve.run(build_app(config), name=_APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise StageError(f"the service does not start: {error}") from error


def _wait_ready(address: ListenAddress, stop_signal: StopSignal) -> bool:
    """Wait for models and catalogs; return False after a signal."""
    logged: list[str] = []
    while not stop_signal.wait(_POLL_INTERVAL_S):
        waiting = _pending_components(address.url)
        if not waiting:
            return True
        if waiting != logged:
            logger.info("waiting for %s", ", ".join(waiting))
            logged = waiting
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
    """Reject new requests and wait for the running ones."""
    deadline = time.monotonic() + timeout_s
    gateway: Any = serve.get_deployment_handle("Gateway", _APP_NAME)
    while time.monotonic() < deadline:
        try:
            in_flight = gateway.broadcast("drain").results(timeout_s=5)
        except Exception as error:  # noqa: BLE001  a lost replica has no running requests
            logger.info("a gateway does not respond: %s", type(error).__name__)
            return
        if not sum(in_flight):
            return
        time.sleep(_POLL_INTERVAL_S)


def _shut_down(started_here: bool) -> None:
    serve.shutdown()
    if started_here:
        ray.shutdown()


def _cpus(config: ServiceConfig) -> int:
    """Return the CPUs of a Ray started here, at least those of all replicas."""
    replicas = (config.gateway, config.retrieval, config.segmenter)
    needed = sum(kind.cpus * kind.max_replicas for kind in replicas)
    return max(os.cpu_count() or 1, int(-(-needed // 1)))
