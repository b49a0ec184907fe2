"""Import path of the proxies' middlewares in cluster images: ``actors.proxying:middlewares``."""

from actors.serve.proxy_errors import middlewares

__all__ = ["middlewares"]
