"""Bearer tokens of the endpoint, and the file with their digests.

The file is YAML or JSON::

    tokens:
      - name: night-team                  # for logs
        sha256: 9f86d08...                # of the token; `loraseg token new` prints both
        roles: [segment, admin]           # default: [segment]
        adapters: ["night*", "rain"]      # visible adapters (fnmatch patterns); default: all
        concurrent: 8                     # limit of concurrent requests per gateway replica
"""

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from loraseg.config import build
from loraseg.errors import ConfigError, LorasegError, ServiceError
from loraseg.storage import open_store
from loraseg.storage.store import SHORT_RETRY_TIMEOUT_S

__all__ = ["Role", "Token", "TokenFile", "TokenStore", "new_token"]

logger = logging.getLogger(__name__)

Role = Literal["segment", "admin"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_TOKEN_CHARS = 512
# A token that is removed from the file is rejected after this time at the latest.
_RELOAD_INTERVAL_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One entry of the file.

    Attributes:
        name: For logs; distinct.
        sha256: Hex digest of the token.
        roles: ``segment`` permits all routes but the admin routes, ``admin`` only those.
        adapters: Name patterns (``fnmatch``) of the visible adapters; None for all.
        concurrent: Limit of concurrent requests; None for the service's limit.
    """

    name: str
    sha256: str
    roles: tuple[Role, ...] = ("segment",)
    adapters: tuple[str, ...] | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        """Check name, digest, roles and limit."""
        if not self.name.isprintable() or not 1 <= len(self.name) <= 64:
            raise ConfigError(f"name {self.name!r}: expected 1 to 64 printable characters")
        if not _DIGEST.fullmatch(self.sha256):
            raise ConfigError(f"token {self.name!r}: sha256: expected 64 hexadecimal digits")
        if not self.roles or (self.concurrent is not None and self.concurrent < 1):
            raise ConfigError(
                f"token {self.name!r}: expected at least one role and one concurrent request"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """The file as a whole."""

    tokens: tuple[Token, ...]

    def __post_init__(self) -> None:
        """Check that there are tokens and that names and digests are distinct."""
        for key in ("name", "sha256"):
            values = [getattr(token, key) for token in self.tokens]
            if len(set(values)) != len(values):
                raise ConfigError(f"tokens: two entries have the same {key}")
        if not self.tokens:
            raise ConfigError("tokens: expected at least one; an open service has no token file")


class TokenStore:
    """The tokens of a file, which is reloaded when it changes. Thread-safe."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._content = read()
        self._tokens = _parse(self._content)
        self._checked_at = time.monotonic()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str) -> "TokenStore":
        """Open a file by path or store URI (``s3://bucket/tokens.yaml``).

        Raises:
            ConfigError: The file cannot be read or is not a token file.
        """
        folder, _, name = uri.rpartition("/")
        try:
            if "://" not in uri:
                return cls(Path(uri).read_bytes)
            store = open_store(folder).with_retry_timeout(SHORT_RETRY_TIMEOUT_S)
            return cls(lambda: store.get(name))
        except (OSError, LorasegError) as error:
            raise ConfigError(f"token file {uri}: {error}") from error

    def authenticate(self, secret: str) -> Token:
        """Return the entry of a token.

        Raises:
            ServiceError: ``unauthorized``.
        """
        digest = hashlib.sha256(secret[: _MAX_TOKEN_CHARS + 1].encode()).hexdigest()
        match = None
        for token in self._tokens:
            # Compares all entries, so that the duration does not depend on the match.
            if hmac.compare_digest(token.sha256, digest):
                match = token
        if match is None:
            raise ServiceError("unauthorized", "unknown token")
        return match

    @property
    def needs_reload(self) -> bool:
        """Whether the file should be read again."""
        return time.monotonic() - self._checked_at > _RELOAD_INTERVAL_S

    def reload(self) -> None:
        """Read the file again; keep the current tokens if it is invalid or missing."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._checked_at = time.monotonic()
            content = self._read()
            if content != self._content:
                self._tokens = _parse(content)
                self._content = content
                logger.info("token file: %d tokens loaded", len(self._tokens))
        except (OSError, LorasegError) as error:
            logger.warning("token file: not reloaded, the previous tokens stay valid: %s", error)
        finally:
            self._lock.release()


def new_token() -> tuple[str, str]:
    """Return a new token of 256 random bits, and its sha256 in hex."""
    token = secrets.token_urlsafe(32)
    return token, hashlib.sha256(token.encode()).hexdigest()


def _parse(content: bytes) -> tuple[Token, ...]:
    try:
        values: Any = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # Only the line number: the parser's message may contain a token.
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"token file: not YAML or JSON{line}") from error
    if not isinstance(values, dict):
        raise ConfigError("token file: expected a mapping with the key 'tokens'")
    entries = values.get("tokens")
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        digest = entry.get("sha256", "") if isinstance(entry, dict) else ""
        # Checked before build(), whose messages repeat values: users may have written the token
        # itself here.
        if not isinstance(digest, str) or (digest and not _DIGEST.fullmatch(digest)):
            raise ConfigError(f"token file: entry {index}: sha256: expected 64 hexadecimal digits")
    return build(TokenFile, values, where="token file").tokens
