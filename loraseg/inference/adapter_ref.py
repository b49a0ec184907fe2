"""What travels from the search to the segmenter: which adapter, and why one is out of service."""

from dataclasses import dataclass
from typing import Any, Literal

from loraseg.errors import IntegrityError, LorasegError, StageError, StoreError
from loraseg.library.snapshot import CatalogEntry
from loraseg.storage import ObjectNotFoundError

__all__ = ["AdapterFailure", "AdapterFailureKind", "AdapterRef", "AdapterUnavailableError"]

AdapterFailureKind = Literal["unreachable", "missing", "damaged", "unfit"]

_REASONS: dict[AdapterFailureKind, str] = {
    "unreachable": "the store cannot be reached",
    "missing": "a stored file is missing",
    "damaged": "stored bytes differ from their digest",
    "unfit": "it does not fit the base model",
}


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """All that a segmenter needs to load and check one published adapter.

    Attributes:
        library: The service's name for the library that it is in.
        name: What people call it.
        version: From 1.
        digest: sha256 (hex) of the weight files.
        record_digest: sha256 (hex) of the record.
        base_digest: sha256 (hex) of the base that it was trained on.
        size_bytes: All files together.
    """

    library: str
    name: str
    version: int
    digest: str
    record_digest: str
    base_digest: str
    size_bytes: int

    @classmethod
    def from_entry(cls, library: str, entry: CatalogEntry) -> "AdapterRef":
        """Return the reference to a catalog entry."""
        return cls(
            library,
            entry.name,
            entry.version,
            entry.digest,
            entry.record_digest,
            entry.card.base.digest,
            entry.size_bytes,
        )


@dataclass(frozen=True, slots=True)
class AdapterFailure:
    """An adapter that cannot be used now; ``reason`` is meant for a client's eyes."""

    name: str
    version: int
    digest: str
    reason: str
    kind: AdapterFailureKind

    @classmethod
    def from_error(cls, ref: AdapterRef, error: Exception) -> "AdapterFailure":
        """Say in words, without places or paths, why loading ``ref`` failed."""
        kind = _failure_kind(error)
        return cls(ref.name, ref.version, ref.digest, _REASONS[kind], kind)


class AdapterUnavailableError(StageError):
    """Chosen adapters cannot be loaded; choosing again without them may help.

    Attributes:
        failures: One for each of them.
    """

    def __init__(self, failures: tuple[AdapterFailure, ...]) -> None:
        words = "; ".join(f"{f.name} version {f.version}: {f.reason}" for f in failures)
        super().__init__(f"adapters cannot be loaded: {words}")
        self.failures = failures

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the failures when the error travels between processes."""
        return AdapterUnavailableError, (self.failures,)


def _failure_kind(error: Exception) -> AdapterFailureKind:
    if isinstance(error, ObjectNotFoundError) or isinstance(error.__cause__, ObjectNotFoundError):
        return "missing"
    if isinstance(error, IntegrityError):
        return "damaged"
    if isinstance(error, StoreError) or not isinstance(error, LorasegError):
        return "unreachable"
    return "unfit"
