"""Errors for clients of an endpoint that several modules raise."""

from collections.abc import Iterable

from loraseg.errors import ServiceError

__all__ = ["draining_error", "no_such_library_error", "overloaded_error"]

_MAX_NAME_CHARS = 60


def no_such_library_error(name: str, libraries: Iterable[str]) -> ServiceError:
    """Return the error for a library name that is not among ``libraries``."""
    shown = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."
    known = ", ".join(repr(other) for other in libraries)
    return ServiceError("no_such_library", f"no library {shown!a}; there are {known}")


def overloaded_error(limit: int) -> ServiceError:
    """Return the error for an image beyond the ``limit`` of images that may wait."""
    return ServiceError("overloaded", f"{limit} images are waiting already", retry_after_s=1.0)


def draining_error() -> ServiceError:
    """Return the error for a request during shutdown."""
    return ServiceError("draining", "the service is shutting down", retry_after_s=5.0)
