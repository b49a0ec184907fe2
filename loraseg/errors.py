"""Exceptions of loraseg. A message names the subject, the value, the expected value and the place.

LorasegError
├── ConfigError           (ValueError)    a setting is unknown or has a wrong type or value
├── AdapterMismatchError  (ValueError)    an adapter does not fit the model or the other adapters
├── AdapterNotFoundError  (LookupError)   the library has no adapter of that name or version
├── StoreError            (OSError)       a store is unreachable or lacks a required feature
├── IntegrityError        (ValueError)    data differ from their digest or format
├── DatasetError          (ValueError)    an image, mask or class list is invalid
├── StageError            (RuntimeError)  a computation failed (NaN loss, lost worker, ...)
└── ServiceError          (RuntimeError)  the endpoint refuses or cannot answer a request
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

# Raised by code that reads a field of untrusted JSON if the JSON has an unexpected structure.
MALFORMED_INPUT_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class LorasegError(Exception):
    """Base of all errors that loraseg raises."""


class ConfigError(LorasegError, ValueError):
    """A setting is unknown or has a wrong type or value."""


class AdapterMismatchError(LorasegError, ValueError):
    """An adapter does not fit the model or the adapters that it is mixed with."""


class AdapterNotFoundError(LorasegError, LookupError):
    """The library has no adapter of that name or version."""


class StoreError(LorasegError, OSError):
    """A store is unreachable or lacks a feature that loraseg requires."""


class IntegrityError(LorasegError, ValueError):
    """Data differ from their digest, or a file does not have the declared format."""


class DatasetError(LorasegError, ValueError):
    """An image, a mask or a class list is invalid; the message names the file."""


class StageError(LorasegError, RuntimeError):
    """A computation failed, for example because the loss is not finite."""


class ServiceError(LorasegError, RuntimeError):
    """The endpoint refuses a request or cannot answer it.

    Attributes:
        code: A documented problem code, such as ``overloaded``; each has one HTTP status.
        retry_after_s: Seconds after which a retry may succeed; None if a retry cannot succeed.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the attributes when the error is pickled."""
        return _service_error, (self.code, str(self), self.retry_after_s)


def _service_error(code: str, message: str, retry_after_s: float | None) -> ServiceError:
    return ServiceError(code, message, retry_after_s=retry_after_s)
