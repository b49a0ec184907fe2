"""Checks of an endpoint from a client's side, for ``loraseg doctor``."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from loraseg.api_types import LibraryInfo
from loraseg.checks import Check
from loraseg.client.requests import Request
from loraseg.client.synchronous import Client
from loraseg.client.transport import Response
from loraseg.errors import LorasegError, ServiceError

__all__ = ["check_endpoint"]

_TIMEOUT_S = 30.0
# With more, S3 rejects signatures and certificates seem expired.
_MAX_CLOCK_SKEW_S = 60.0
_MIN_CERTIFICATE_DAYS = 14
# Catalogs are polled every few seconds.
_MAX_CATALOG_AGE_S = 60.0
_CLASSES = ("road", "sky")


def check_endpoint(url: str, token: str | None = None) -> Iterator[Check]:
    """Yield the results of all checks; stop early if later ones depend on a failed one.

    Args:
        url: Of the endpoint.
        token: Bearer token; None checks only the public routes of an endpoint with tokens.

    Raises:
        ConfigError: The URL or the token is invalid.
    """
    with Client(url, token, timeout_s=_TIMEOUT_S, retries=1) as client:
        try:
            response = client.request(Request(method="GET", path="/healthz"))
        except ServiceError as error:
            yield Check(f"endpoint {url}", str(error), ok=False)
            return
        yield Check(f"endpoint {url}", "answers")
        yield _check_tls(client, response)
        yield _check_clock(response)
        yield _check("ready", lambda: _require_ready(client))
        base = _result_or_error(client.base)
        if isinstance(base, LorasegError):
            yield Check("base", _error_detail(base, token), ok=False)
            return
        yield Check("base", f"{base.get('name')} {str(base.get('digest'))[:12]}")
        for name in base.get("libraries", ()):
            yield from _check_library(client, str(name))
        yield _check("segmentation", lambda: _round_trip(client))


def _check(name: str, detail: Callable[[], str]) -> Check:
    try:
        return Check(name, detail())
    except LorasegError as error:
        return Check(name, str(error), ok=False)


def _result_or_error(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | LorasegError:
    try:
        return call()
    except LorasegError as error:
        return error


def _error_detail(error: LorasegError, token: str | None) -> str:
    if isinstance(error, ServiceError) and error.code == "unauthorized" and token is None:
        return f"{error}; pass a file with a token as --token-file"
    return str(error)


def _check_tls(client: Client, response: Response) -> Check:
    if response.tls is None:
        if client.endpoint.is_loopback:
            return Check("TLS", "none, and none needed on this machine")
        return Check("TLS", "none: images and tokens are sent unencrypted", ok=False)
    version, certificate = response.tls.version(), response.tls.getpeercert() or {}
    expiry = certificate.get("notAfter")
    if not isinstance(expiry, str):
        return Check("TLS", f"{version}")
    days = (ssl.cert_time_to_seconds(expiry) - time.time()) / 86400
    detail = f"{version}, certificate expires in {days:.0f} days"
    return Check("TLS", detail, ok=days > _MIN_CERTIFICATE_DAYS)


def _check_clock(response: Response) -> Check:
    with suppress(ValueError, TypeError, OverflowError):
        skew_s = parsedate_to_datetime(response.date or "").timestamp() - time.time()
        detail = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
        return Check("clock", detail, ok=abs(skew_s) <= _MAX_CLOCK_SKEW_S)
    return Check("clock", "the response has no Date header")


def _require_ready(client: Client) -> str:
    client.request(Request(method="GET", path="/readyz"))
    return "base model and catalogs are loaded"


def _check_library(client: Client, name: str) -> Iterator[Check]:
    title = f"library {name}"
    try:
        library = client.library(name)
        unavailable = [adapter for adapter in client.adapters(name) if adapter.unavailable]
    except LorasegError as error:
        yield Check(title, str(error), ok=False)
        return
    yield Check(title, _library_detail(library), ok=_is_healthy(library))
    for adapter in unavailable:
        detail = f"version {adapter.version} is out of service: {adapter.unavailable}"
        yield Check(f"{title}, {adapter.name}", detail, ok=False)


def _is_healthy(library: LibraryInfo) -> bool:
    is_recent = library.checked_s <= _MAX_CATALOG_AGE_S
    return library.problem is None and library.adapters > 0 and is_recent


def _library_detail(library: LibraryInfo) -> str:
    parts = [
        f"generation {library.generation}, in use for {library.loaded_s:.0f} s, "
        f"checked {library.checked_s:.0f} s ago",
        f"{library.adapters} adapters",
    ]
    if library.unavailable:
        parts.append(f"{library.unavailable} out of service")
    if library.misfits:
        parts.append(f"{library.misfits} more do not fit the base")
    return "; ".join([*parts, library.problem] if library.problem else parts)


def _round_trip(client: Client) -> str:
    rows = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.repeat(rows[:, None, None], 64, axis=1).repeat(3, axis=2)
    started = time.perf_counter()
    response = client.segment(image, _CLASSES)
    total_ms = 1000 * (time.perf_counter() - started)
    adapters = ", ".join(adapter.name for adapter in response.adapters)
    service_ms = response.timing_ms.get("total", 0.0)
    return (
        f"64 x 64 pixels in {total_ms:.0f} ms, {service_ms:.0f} of them in the service; "
        f"{adapters or response.fallback or 'bare base'}"
    )
