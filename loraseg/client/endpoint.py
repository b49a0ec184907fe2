"""The checked URL of an endpoint, and the token sent to it."""

import ipaddress
import string
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loraseg.errors import ConfigError

__all__ = ["Endpoint", "parse_endpoint", "read_token"]

_TOKEN_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~+/=")
_MAX_TOKEN_CHARS = 4096
_EXPECTED = "http(s)://host[:port][/path]"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The checked URL of an endpoint.

    Attributes:
        url: Scheme, host and optional path prefix, without a trailing slash.
        is_encrypted: Whether the connection uses TLS.
        is_loopback: Whether the host is this machine.
    """

    url: str
    is_encrypted: bool
    is_loopback: bool


def parse_endpoint(url: str, token: str | None, *, allow_insecure: bool) -> Endpoint:
    """Check a URL, and that the token would not be sent unencrypted.

    Raises:
        ConfigError: Not an http(s) URL with a host; the URL has a user name, query or fragment;
            the token has invalid characters; or it would leave this machine unencrypted without
            ``allow_insecure``. No message repeats the token or a password.
    """
    if "@" in url:
        raise ConfigError(
            f"endpoint URL: it has a user name or password, expected {_EXPECTED}; "
            "pass the token separately"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"endpoint URL: got {url!r}, expected {_EXPECTED}: {error}") from error
    is_invalid = not host or not url.isprintable() or " " in url or port == 0
    if parts.scheme not in ("http", "https") or is_invalid or parts.query or parts.fragment:
        raise ConfigError(f"endpoint URL: got {url!r}, expected {_EXPECTED}")
    endpoint = Endpoint(url.rstrip("/"), parts.scheme == "https", _is_loopback(host))
    if token is not None:
        _check_token(token)
        if not (endpoint.is_encrypted or endpoint.is_loopback or allow_insecure):
            raise ConfigError(
                f"{endpoint.url}: the token would be sent unencrypted; expected https, an address "
                "of this machine, or allow_insecure=True on a trusted network"
            )
    return endpoint


def read_token(path: str | Path) -> str:
    """Read a token from a file that contains nothing else; surrounding blanks are stripped.

    Raises:
        ConfigError: The file cannot be read, or does not contain exactly one token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the token: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a token, got bytes that are not UTF-8") from error
    token = text.strip()
    try:
        _check_token(token)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return token


def _check_token(token: str) -> None:
    if not 1 <= len(token) <= _MAX_TOKEN_CHARS or not _TOKEN_CHARACTERS.issuperset(token):
        raise ConfigError(
            f"token: expected 1 to {_MAX_TOKEN_CHARS} letters, digits and -._~+/=, "
            "got a different length or other characters"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
