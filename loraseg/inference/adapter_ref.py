"""References to published adapters, and why one cannot be loaded.

Both are small enough to travel between the processes of an endpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from loraseg.errors import IntegrityError, LorasegError, StageError, StoreError
from loraseg.library.snapshot import CatalogEntry
from loraseg.storage import ObjectNotFoundError

__all__ = [
    "AdapterEntry",
    "AdapterFailure",
    "AdapterFailureKind",
    "AdapterRef",
    "AdapterUnavailableError",
]

AdapterFailureKind = Literal["unreachable", "missing", "damaged", "unfit"]

_REASONS: dict[AdapterFailureKind, str] = {
    "unreachable": "the store cannot be reached",
    "missing": "a stored file is missing",
    "damaged": "stored bytes differ from their digest",
    "unfit": "it does not fit the base model",
}


@runtime_checkable
class AdapterEntry(Protocol):
    """Identifies one published adapter: a catalog entry or an :class:`AdapterRef`."""

    @property
    def name(self) -> str:
        """Name in the library."""
        ...

    @property
    def version(self) -> int | str:
        """Version under that name."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 of the weight files."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """The fields of a catalog entry that are needed to load and check its adapter.

    Attributes:
        library: Name of its library, as :class:`~loraseg.inference.adapter_loader.AdapterLoader`
            knows it.
        name: Name in the library.
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
    """An adapter that cannot be loaded; ``reason`` is shown to clients of an endpoint."""

    name: str
    version: int | str
    digest: str
    reason: str
    kind: AdapterFailureKind

    @classmethod
    def from_error(cls, entry: AdapterEntry, error: Exception) -> "AdapterFailure":
        """Describe, without paths or URIs, why loading ``entry`` failed."""
        kind = _failure_kind(error)
        return cls(entry.name, entry.version, entry.digest, _REASONS[kind], kind)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: name, version, digest and reason."""
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "reason": self.reason,
        }


class AdapterUnavailableError(StageError):
    """Selected adapters cannot be loaded; another selection without them may work.

    Its cause (``__cause__``) is the error of the first of them.

    Attributes:
        failures: One for each adapter that cannot be loaded, at least one.
    """

    def __init__(self, failures: Sequence[AdapterFailure]) -> None:
        reasons = "; ".join(f"{f.name} version {f.version}: {f.reason}" for f in failures)
        super().__init__(f"adapters cannot be loaded: {reasons}")
        self.failures = tuple(failures)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the failures when the error is pickled."""
        return AdapterUnavailableError, (self.failures,)


def _failure_kind(error: Exception) -> AdapterFailureKind:
    if isinstance(error, ObjectNotFoundError) or isinstance(error.__cause__, ObjectNotFoundError):
        return "missing"
    if isinstance(error, IntegrityError):
        return "damaged"
    if isinstance(error, StoreError) or not isinstance(error, LorasegError):
        return "unreachable"
    return "unfit"
