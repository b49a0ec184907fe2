"""The error tree. Every message says what, got, expected and where.

LorasegError
├── ConfigError           (ValueError)    a setting is unknown, mistyped or out of range
├── AdapterMismatchError  (ValueError)    an adapter does not fit the model or its mixing partners
├── AdapterNotFoundError  (LookupError)   no adapter of that name or version
├── StoreError            (OSError)       a store cannot be reached or lacks what is needed of it
├── IntegrityError        (ValueError)    bytes differ from their digest or claim
├── DatasetError          (ValueError)    an image, mask or class list is unusable
├── StageError            (RuntimeError)  a computation stopped for its own reason (NaN loss, ...)
└── ServiceError          (RuntimeError)  the endpoint refuses a request or cannot answer it now
"""

from typing import Any

__all__ = [
    "MALFORMED_INPUT_ERRORS",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "ConfigError",
    "DatasetError",
    "IntegrityError",
    "LorasegError",
    "ServiceError",
    "StageError",
    "StoreError",
]

# What taking apart JSON from outside may raise where it is not of the shape that is expected.
MALFORMED_INPUT_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class LorasegError(Exception):
    """Base of all errors that loraseg raises on purpose."""


class ConfigError(LorasegError, ValueError):
    """A setting is unknown, mistyped or out of range."""


class AdapterMismatchError(LorasegError, ValueError):
    """An adapter does not fit the model, or the adapters it is mixed with."""


class AdapterNotFoundError(LorasegError, LookupError):
    """The library has no adapter of that name or version."""


class StoreError(LorasegError, OSError):
    """A store cannot be reached, or lacks something that loraseg relies on."""


class IntegrityError(LorasegError, ValueError):
    """Bytes differ from their digest, or a file is not what it claims to be."""


class DatasetError(LorasegError, ValueError):
    """An image, a mask or a class list cannot be used; the message names the file."""


class StageError(LorasegError, RuntimeError):
    """A computation stopped for a reason of its own, such as a loss that is not finite."""


class ServiceError(LorasegError, RuntimeError):
    """The endpoint refuses a request, or cannot answer it now.

    Attributes:
        code: One of the documented ones, such as ``overloaded``; each belongs to one HTTP status.
        retry_after_s: When asking again may help; None if it will not.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the attributes when the error travels between processes."""
        return _service_error, (self.code, str(self), self.retry_after_s)


def _service_error(code: str, message: str, retry_after_s: float | None) -> ServiceError:
    return ServiceError(code, message, retry_after_s=retry_after_s)
