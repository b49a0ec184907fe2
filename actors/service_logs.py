"""Where a replica's log lines go: into Serve's own files, one JSON object a line."""

import logging

from ray.serve.schema import LoggingConfig

__all__ = ["LOGGING", "join_serve_logs"]

# Serve adds time, deployment, replica and request id; its own line per request would only repeat
# what the API logs.
LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)

_SERVE = "ray.serve"
_OURS = ("loraseg", "actors")


def join_serve_logs() -> None:
    """Let what loraseg logs in this replica go where Serve's own lines go."""
    serve = logging.getLogger(_SERVE)
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.setLevel(serve.level)
        logger.handlers = list(serve.handlers)
        logger.propagate = False
