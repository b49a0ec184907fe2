"""Where an endpoint is, and whether a token may be sent there."""

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
    """The checked URL of an endpoint, without a slash at its end.

    Attributes:
        url: Scheme, host and perhaps a path that all routes are below.
        is_encrypted: Whether TLS protects what is sent.
        is_loopback: Whether it is on this machine.
    """

    url: str
    is_encrypted: bool
    is_loopback: bool


def parse_endpoint(url: str, token: str | None, *, allow_insecure: bool) -> Endpoint:
    """Check a URL, and that the token would not travel in the clear.

    Raises:
        ConfigError: Not the http(s) URL of a host, it holds a user name, query or fragment, the
            token has characters that no token has, or it would leave this machine unencrypted
            without ``allow_insecure``. No message repeats the token or a password.
    """
    if "@" in url:
        raise ConfigError(
            f"endpoint URL: got a user name or password in it, expected {_EXPECTED}; "
            "tokens are given apart from the URL"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"endpoint URL: got {url!r}, expected {_EXPECTED}: {error}") from error
    unfit = not host or not url.isprintable() or " " in url or port == 0
    if parts.scheme not in ("http", "https") or unfit or parts.query or parts.fragment:
        raise ConfigError(f"endpoint URL: got {url!r}, expected {_EXPECTED}")
    address = Endpoint(url.rstrip("/"), parts.scheme == "https", _is_loopback(host))
    if token is not None:
        _check_token(token)
        if not (address.is_encrypted or address.is_loopback or allow_insecure):
            raise ConfigError(
                f"{address.url}: a token would travel unencrypted; expected https, an address of "
                "this machine, or allow_insecure=True on a network where nobody can listen"
            )
    return address


def read_token(path: str | Path) -> str:
    """Read a token from a file that holds nothing else; blanks around it are dropped.

    Raises:
        ConfigError: The file cannot be read, or does not hold one token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the token: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a token, got bytes that are no text") from error
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
            "got other characters or another length"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
