"""Look at an endpoint as a client sees it: for ``loraseg doctor``."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from loraseg.client.asking import Question
from loraseg.client.reply import LibraryInfo
from loraseg.client.synchronous import Client
from loraseg.client.transfer import Answer
from loraseg.doctor import Finding
from loraseg.errors import LorasegError, ServiceError

__all__ = ["diagnose"]

_TIMEOUT_S = 30.0
# Beyond it, signatures of S3 requests and lifetimes of certificates begin to suffer.
_CLOCK_S = 60.0
_CERTIFICATE_DAYS = 14
# Catalogs are looked at every few seconds.
_CHECKED_S = 60.0
_CLASSES = ("road", "sky")


def diagnose(url: str, token: str | None = None) -> Iterator[Finding]:
    """Yield findings about an endpoint; the first one that ends the search comes last.

    Args:
        url: Of the endpoint.
        token: Bearer token; without one, an endpoint that asks for tokens tells little.

    Raises:
        ConfigError: The URL or the token is unfit.
    """
    with Client(url, token, timeout_s=_TIMEOUT_S, retries=1) as client:
        try:
            answer = client.ask(Question(method="GET", path="/healthz"))
        except ServiceError as error:
            yield Finding(f"endpoint {url}", str(error), is_well=False)
            return
        yield Finding(f"endpoint {url}", "answers")
        yield _protection(client, answer)
        yield _clock(answer)
        yield _tried("ready", lambda: _ready(client))
        base = _tried_values(client.base)
        if isinstance(base, LorasegError):
            yield Finding("base", _in_words(base, token), is_well=False)
            return
        yield Finding("base", f"{base.get('name')} {str(base.get('digest'))[:12]}")
        for name in base.get("libraries", ()):
            yield from _library(client, str(name))
        yield _tried("segmentation", lambda: _round_trip(client))


def _tried(what: str, state: Callable[[], str]) -> Finding:
    try:
        return Finding(what, state())
    except LorasegError as error:
        return Finding(what, str(error), is_well=False)


def _tried_values(ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | LorasegError:
    try:
        return ask()
    except LorasegError as error:
        return error


def _in_words(error: LorasegError, token: str | None) -> str:
    if isinstance(error, ServiceError) and error.code == "unauthorized" and token is None:
        return f"{error}; name a file with a token by --token-file"
    return str(error)


def _protection(client: Client, answer: Answer) -> Finding:
    if answer.tls is None:
        if client.address.is_loopback:
            return Finding("TLS", "none, and none needed on this machine")
        return Finding("TLS", "none: whoever can listen reads images and tokens", is_well=False)
    version, certificate = answer.tls.version(), answer.tls.getpeercert() or {}
    ends = certificate.get("notAfter")
    if not isinstance(ends, str):
        return Finding("TLS", f"{version}")
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400
    state = f"{version}, certificate for {days:.0f} more days"
    return Finding("TLS", state, is_well=days > _CERTIFICATE_DAYS)


def _clock(answer: Answer) -> Finding:
    with suppress(ValueError, TypeError, OverflowError):
        apart_s = parsedate_to_datetime(answer.date or "").timestamp() - time.time()
        state = f"{abs(apart_s):.0f} s {'ahead of' if apart_s > 0 else 'behind'} this machine's"
        return Finding("clock", state, is_well=abs(apart_s) <= _CLOCK_S)
    return Finding("clock", "not told")


def _ready(client: Client) -> str:
    client.ask(Question(method="GET", path="/readyz"))
    return "base model and catalogs are loaded"


def _library(client: Client, name: str) -> Iterator[Finding]:
    what = f"library {name}"
    try:
        state = client.library(name)
        lacking = [adapter for adapter in client.adapters(name) if adapter.unavailable]
    except LorasegError as error:
        yield Finding(what, str(error), is_well=False)
        return
    yield Finding(what, _in_numbers(state), is_well=_is_well(state))
    for adapter in lacking:
        state_of_it = f"version {adapter.version} is out of service: {adapter.unavailable}"
        yield Finding(f"{what}, {adapter.name}", state_of_it, is_well=False)


def _is_well(state: LibraryInfo) -> bool:
    return state.problem is None and state.adapters > 0 and state.checked_s <= _CHECKED_S


def _in_numbers(state: LibraryInfo) -> str:
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
