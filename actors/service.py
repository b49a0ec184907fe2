"""Import path of the Serve application in commands and YAML: ``actors.service:build_app``."""

from ray.serve import Application

from actors.serve import app as _app
from actors.serve.app import build_app

__all__ = ["build_app"]


def __getattr__(name: str) -> Application:
    """Return ``app``, the application of the config file that LORASEG_SERVICE names."""
    return getattr(_app, name)
