"""Logging of replicas into Serve's log files, one JSON object per line."""

import logging

from ray.serve.schema import LoggingConfig

__all__ = ["LOGGING", "attach_serve_logging"]

# Serve adds time, deployment, replica and request id. Its access log is off, since the API logs
# each request.
LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)

_SERVE_LOGGER = "ray.serve"
_PACKAGE_LOGGERS = ("loraseg", "actors")


def attach_serve_logging() -> None:
    """Send the log records of loraseg in this replica to Serve's handlers."""
    serve = logging.getLogger(_SERVE_LOGGER)
    for name in _PACKAGE_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(serve.level)
        logger.handlers = list(serve.handlers)
        logger.propagate = False
