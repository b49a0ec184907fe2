"""Settings and helpers of processes that serve an endpoint in the foreground."""

import signal
import socket
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType

from loraseg.errors import ConfigError
from loraseg.serving.config import ServiceConfig

__all__ = ["ListenAddress", "ServeConfig", "StopSignal"]

_QUICKSTART_LIBRARY = Path("runs/quickstart/library")
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def _quickstart_library() -> dict[str, str]:
    return {"main": str(_QUICKSTART_LIBRARY)} if _QUICKSTART_LIBRARY.is_dir() else {}


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Host and TCP port to listen on; port 0 stands for any free port."""

    host: str
    port: int

    def bind(self) -> socket.socket:
        """Return a bound socket that does not listen yet.

        Raises:
            ConfigError: The port is in use, or the host is not an address of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
        except OSError as error:
            bound.close()
            raise ConfigError(f"{self.host} port {self.port}: {error.strerror}") from error
        return bound

    def with_free_port(self) -> "ListenAddress":
        """Return the address with a port that is free at present.

        Raises:
            ConfigError: As for :meth:`bind`.
        """
        with self.bind() as bound:
            return ListenAddress(self.host, bound.getsockname()[1])

    @property
    def url(self) -> str:
        """URL for a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(ServiceConfig):
    """An endpoint and its address.

    Attributes:
        libraries: As in :class:`ServiceConfig`; by default the quickstart's library, if it exists.
        host: Interface to listen on.
        port: TCP port; 0 for a free one.
        open_to_all: Permit other interfaces than loopback without tokens: every client that can
            reach the port may use the service.
    """

    libraries: dict[str, str] = field(default_factory=_quickstart_library)
    host: str = "127.0.0.1"
    port: int = 8000
    open_to_all: bool = False

    def service(self) -> ServiceConfig:
        """Return the endpoint's settings without the address."""
        return ServiceConfig(
            **{item.name: getattr(self, item.name) for item in fields(ServiceConfig)}
        )

    def address(self) -> ListenAddress:
        """Return the address.

        Raises:
            ConfigError: Other machines could use the service without a token.
        """
        if self.host not in _LOOPBACK_HOSTS and self.tokens is None and not self.open_to_all:
            raise ConfigError(
                f"host {self.host}: other machines could use the service without a token; set "
                "tokens=FILE (`loraseg token new` creates tokens) or open_to_all=true"
            )
        return ListenAddress(self.host, self.port)


class StopSignal:
    """Set by SIGINT and SIGTERM; a second signal has its default effect."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._event.set()
        signal.signal(number, signal.SIG_DFL)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for a signal; return whether there was one."""
        return self._event.wait(timeout_s)
