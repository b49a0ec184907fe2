"""Look at an endpoint as a client sees it: for ``loraseg doctor``."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from loraseg.checks import Check
from loraseg.client.requests import Request
from loraseg.client.responses import LibraryInfo
from loraseg.client.synchronous import Client
from loraseg.client.transport import Response
from loraseg.errors import LorasegError, ServiceError

__all__ = ["check_endpoint"]

_TIMEOUT_S = 30.0
# Beyond it, signatures of S3 requests and lifetimes of certificates begin to suffer.
_MAX_CLOCK_SKEW_S = 60.0
_MIN_CERTIFICATE_DAYS = 14
# Catalogs are looked at every few seconds.
_MAX_CATALOG_AGE_S = 60.0
_CLASSES = ("road", "sky")


def check_endpoint(url: str, token: str | None = None) -> Iterator[Check]:
    """Yield findings about an endpoint; the first one that ends the search comes last.

    Args:
        url: Of the endpoint.
        token: Bearer token; without one, an endpoint that asks for tokens tells little.

    Raises:
        ConfigError: The URL or the token is unfit.
    """
    with Client(url, token, timeout_s=_TIMEOUT_S, retries=1) as client:
        try:
            answer = client.request(Request(method="GET", path="/healthz"))
        except ServiceError as error:
            yield Check(f"endpoint {url}", str(error), ok=False)
            return
        yield Check(f"endpoint {url}", "answers")
        yield _check_tls(client, answer)
        yield _check_clock(answer)
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
        return f"{error}; name a file with a token by --token-file"
    return str(error)


def _check_tls(client: Client, answer: Response) -> Check:
    if answer.tls is None:
        if client.endpoint.is_loopback:
            return Check("TLS", "none, and none needed on this machine")
        return Check("TLS", "none: whoever can listen reads images and tokens", ok=False)
    version, certificate = answer.tls.version(), answer.tls.getpeercert() or {}
    ends = certificate.get("notAfter")
    if not isinstance(ends, str):
        return Check("TLS", f"{version}")
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400
    state = f"{version}, certificate for {days:.0f} more days"
    return Check("TLS", state, ok=days > _MIN_CERTIFICATE_DAYS)


def _check_clock(answer: Response) -> Check:
    with suppress(ValueError, TypeError, OverflowError):
        apart_s = parsedate_to_datetime(answer.date or "").timestamp() - time.time()
        state = f"{abs(apart_s):.0f} s {'ahead of' if apart_s > 0 else 'behind'} this machine's"
        return Check("clock", state, ok=abs(apart_s) <= _MAX_CLOCK_SKEW_S)
    return Check("clock", "not told")


def _require_ready(client: Client) -> str:
    client.request(Request(method="GET", path="/readyz"))
    return "base model and catalogs are loaded"


def _check_library(client: Client, name: str) -> Iterator[Check]:
    what = f"library {name}"
    try:
        state = client.library(name)
        lacking = [adapter for adapter in client.adapters(name) if adapter.unavailable]
    except LorasegError as error:
        yield Check(what, str(error), ok=False)
        return
    yield Check(what, _library_detail(state), ok=_is_healthy(state))
    for adapter in lacking:
        state_of_it = f"version {adapter.version} is out of service: {adapter.unavailable}"
        yield Check(f"{what}, {adapter.name}", state_of_it, ok=False)


def _is_healthy(state: LibraryInfo) -> bool:
    return state.problem is None and state.adapters > 0 and state.checked_s <= _MAX_CATALOG_AGE_S


def _library_detail(state: LibraryInfo) -> str:
    parts = [
        f"generation {state.generation}, in use for {state.loaded_s:.0f} s, "
        f"checked {state.checked_s:.0f} s ago",
        f"{state.adapters} adapters",
    ]
    if state.unavailable:
        parts.append(f"{state.unavailable} out of service")
    if state.misfits:
        parts.append(f"{state.misfits} more do not fit the base")
    return "; ".join([*parts, state.problem] if state.problem else parts)


def _round_trip(client: Client) -> str:
    rows = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.repeat(rows[:, None, None], 64, axis=1).repeat(3, axis=2)
    started = time.perf_counter()
    reply = client.segment(image, _CLASSES)
    whole_ms = 1000 * (time.perf_counter() - started)
    used = ", ".join(adapter.name for adapter in reply.adapters) or reply.fallback or "base alone"
    inside_ms = reply.timing_ms.get("total", 0.0)
    return f"64 x 64 pixels in {whole_ms:.0f} ms, {inside_ms:.0f} of them in the service; {used}"
