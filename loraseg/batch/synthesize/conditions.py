"""What images are generated from: references to conditions, and the protocol of their sources.

Planning and shards know conditions by these types only. Masks are the one kind today
(:mod:`loraseg.batch.synthesize.mask_sources`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from loraseg.data.labels import LabelSpace

__all__ = ["ConditionRef", "ConditionSource", "ScannedCondition"]


@dataclass(frozen=True, slots=True, order=True)
class ConditionRef:
    """Where a condition is; two may share a name, but not file and row.

    Attributes:
        name: Name for users: the key of the file, or the row's name.
        file: Key of the object that holds it.
        row: Row of a file with many conditions; 0 otherwise.
    """

    name: str
    file: str
    row: int = 0


@dataclass(frozen=True, slots=True)
class ScannedCondition:
    """A condition after it was read once.

    Attributes:
        ref: Where it is.
        condition_id: Digest of its content; None if it cannot be read.
        reason: Why no image is generated from it: an error, or which one it duplicates.
    """

    ref: ConditionRef
    condition_id: str | None
    reason: str | None = None


@runtime_checkable
class ConditionSource(Protocol):
    """A collection of conditions. Threads may share one."""

    def label_space(self) -> LabelSpace:
        """Return the classes of the pairs.

        Raises:
            LorasegError: They are missing or invalid.
        """
        ...

    def list_conditions(self) -> list[ConditionRef]:
        """Return all conditions in an order that depends on their names only.

        Raises:
            DatasetError: There are none, or their file is invalid.
            StoreError: The store cannot be read.
        """
        ...

    def read_batches(self, refs: Sequence[ConditionRef]) -> Iterable[Sequence[ConditionRef]]:
        """Split references into batches that several threads can read at once in bounded memory."""
        ...

    def condition_id(self, ref: ConditionRef) -> str:
        """Return the digest of a condition's content, 64 hex digits.

        Raises:
            DatasetError: The condition cannot be used.
            StoreError: The store cannot be read.
        """
        ...
