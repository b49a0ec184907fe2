"""A least-recently-used cache with a limit on the total size of its values."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["LruCache"]

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


def _one(value: object) -> int:
    del value
    return 1


class LruCache(Generic[KeyT, ValueT]):
    """Keeps values until their total size exceeds a limit, then drops the least recently used.

    The newest value is kept even if it is larger than the limit by itself. Thread-safe.
    """

    def __init__(self, limit: int, size: Callable[[ValueT], int] = _one) -> None:
        """Create an empty cache.

        Args:
            limit: Maximum of the sum of sizes.
            size: Size of a value, for instance its bytes; by default 1, so that ``limit`` is a
                number of values.
        """
        self._limit, self._size_of = limit, size
        self._values: OrderedDict[KeyT, ValueT] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get_or_create(self, key: KeyT, create: Callable[[], ValueT]) -> ValueT:
        """Return the value of a key, created and kept if it is missing.

        Threads that need the same missing value at once each create it; the first one is kept.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = create()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._size += self._size_of(value)
                while self._size > self._limit and len(self._values) > 1:
                    _, dropped = self._values.popitem(last=False)
                    self._size -= self._size_of(dropped)
            return self._values[key]

    @property
    def size(self) -> int:
        """Sum of the sizes of all values."""
        return self._size

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._values
