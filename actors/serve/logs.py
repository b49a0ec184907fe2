"""Where a replica's log lines go: into Serve's own files, one JSON object a line."""

import logging

from ray.serve.schema import LoggingConfig

__all__ = ["LOGGING", "attach_serve_logging"]

# Serve adds time, deployment, replica and request id; its own line per request would only repeat
# what the API logs.
LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)

_SERVE_LOGGER = "ray.serve"
_PACKAGE_LOGGERS = ("loraseg", "actors")


def attach_serve_logging() -> None:
    """Let what loraseg logs in this replica go where Serve's own lines go."""
    serve = logging.getLogger(_SERVE_LOGGER)
    for name in _PACKAGE_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(serve.level)
        logger.handlers = list(serve.handlers)
        logger.propagate = False
