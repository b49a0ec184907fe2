"""Serve adapter libraries over HTTP on Ray Serve, with a demo page.

python -m jobs.serve [--config FILE] libraries.main=s3://bucket/adapters port=8000

The page is at http://127.0.0.1:8000. Without libraries it serves the one of `make quickstart`.
SIGINT (Ctrl-C) or SIGTERM stops the endpoint after the running requests. Other interfaces than
loopback require a token file (`tokens=FILE`). `loraseg serve` does the same without Ray.
"""

import sys

from actors.serve.run import serve_until_signal
from loraseg import config as configuration
from loraseg.serving.listen import ServeConfig as Config


def main(config: Config) -> None:
    """Serve until a signal."""

    def announce(url: str) -> None:
        sys.stdout.write(f"ready: {url}\n")
        sys.stdout.flush()

    serve_until_signal(config, announce)


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
