"""The error tree. Every message says what, got, expected and where.

LorasegError
├── ConfigError           (ValueError)    a setting is unknown, mistyped or out of range
├── AdapterMismatchError  (ValueError)    an adapter does not fit the model or its mixing partners
├── AdapterNotFoundError  (LookupError)   no adapter of that name or version
├── StoreError            (OSError)       a store cannot be reached or lacks what is needed of it
├── IntegrityError        (ValueError)    bytes differ from their digest or claim
├── DatasetError          (ValueError)    an image, mask or class list is unusable
└── StageError            (RuntimeError)  a computation stopped for its own reason (NaN loss, ...)
"""

__all__ = [
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "ConfigError",
    "DatasetError",
    "IntegrityError",
    "LorasegError",
    "StageError",
    "StoreError",
]


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
