"""Serve a library over HTTP, with a page to try it.

python -m jobs.serve [--config FILE] libraries.main=s3://bucket/adapters port=8000

The page is at http://127.0.0.1:8000. Without libraries it serves the one that `make quickstart`
made. Ctrl-C or SIGTERM lets running requests finish and ends. Other hosts than this one are let in
only with a token file (`tokens=`).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from actors.serve.run import ListenAddress, serve_until_signal
from loraseg import config as configuration
from loraseg.errors import ConfigError
from loraseg.serving.config import ServiceConfig

_QUICKSTART = Path("runs/quickstart/library")
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def _quickstart_library() -> dict[str, str]:
    return {"main": str(_QUICKSTART)} if _QUICKSTART.is_dir() else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(ServiceConfig):
    """What is served, and where.

    Attributes:
        host: Interface to listen on.
        port: TCP port; 0 for a free one.
        open_to_all: Listen on other interfaces without tokens: everybody who can reach the port may
            use the service.
    """

    libraries: dict[str, str] = field(default_factory=_quickstart_library)
    host: str = "127.0.0.1"
    port: int = 8000
    open_to_all: bool = False


def main(config: Config) -> int:
    """Serve until told to stop."""
    if config.host not in _LOOPBACK_HOSTS and config.tokens is None and not config.open_to_all:
        raise ConfigError(
            f"host {config.host}: others could use the service without a token; name a token file "
            "with tokens=FILE (`loraseg token new` makes tokens), or say open_to_all=true"
        )

    def announce(url: str) -> None:
        sys.stdout.write(f"ready: {url}\n")
        sys.stdout.flush()

    return serve_until_signal(config, ListenAddress(config.host, config.port), announce)


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
