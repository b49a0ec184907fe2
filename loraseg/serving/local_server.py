"""Serve an endpoint from one process, without Ray."""

import logging
import math
import threading
from collections.abc import Callable

import uvicorn

from loraseg.errors import StageError
from loraseg.serving.build import build_local_engine
from loraseg.serving.http_api.app import build_api
from loraseg.serving.listen import ListenAddress, ServeConfig, StopSignal
from loraseg.serving.local_engine import LocalEngine
from loraseg.serving.tokens import TokenStore

__all__ = ["serve_local"]

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.5


def serve_local(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish running requests. From the main thread.

    Args:
        config: The service; settings of replicas have no effect.
        on_ready: Called with the URL when the catalogs are loaded.

    Raises:
        ConfigError: The port is in use, or a field is wrong.
        LorasegError: A model cannot be loaded.
        StageError: The server thread failed.
    """
    address = config.address()
    with address.bind() as listener, build_local_engine(config) as engine:
        address = ListenAddress(address.host, listener.getsockname()[1])
        tokens = TokenStore.open(config.tokens) if config.tokens else None
        server = uvicorn.Server(
            uvicorn.Config(
                build_api(engine, config, tokens=tokens),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=math.ceil(config.limits.request_timeout_s),
            )
        )
        # uvicorn installs no signal handlers outside the main thread.
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        stop_signal = StopSignal()
        thread.start()
        try:
            if _wait_ready(engine, stop_signal, thread):
                on_ready(address.url)
                while not stop_signal.wait(_POLL_INTERVAL_S) and thread.is_alive():
                    pass
            if not thread.is_alive():
                raise StageError("the HTTP server stopped unexpectedly")
            logger.info("finishing running requests")
        finally:
            server.should_exit = True
            thread.join()


def _wait_ready(engine: LocalEngine, stop_signal: StopSignal, thread: threading.Thread) -> bool:
    """Wait for the catalogs; return False after a signal or if the server has stopped."""
    while not engine.wait_until_ready(_POLL_INTERVAL_S):
        if stop_signal.wait(0.0) or not thread.is_alive():
            return False
    return True
