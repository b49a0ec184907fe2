"""Structures in Thrift's compact protocol, as Parquet writes its footers and page headers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["CompactReader", "ThriftError"]

_MAX_DEPTH = 16
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_EIGHT_BYTES = 8


class ThriftError(ValueError):
    """The bytes are not a structure, or are cut off."""


@dataclass(slots=True)
class CompactReader:
    """Reads from ``offset`` on, never at or beyond ``stop``; memory is bounded by what it reads."""

    data: bytes
    offset: int
    stop: int

    def read_bytes(self, count: int) -> bytes:
        """Return the next bytes."""
        before = self.offset
        self.skip(count)
        return self.data[before : self.offset]

    def skip(self, count: int) -> None:
        """Skip bytes."""
        if not 0 <= count <= self.stop - self.offset:
            raise ThriftError("it is cut off")
        self.offset += count

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        """Return a structure as its fields by id.

        Integers are int, text is bytes, lists are lists; doubles are their 8 bytes.

        Raises:
            ThriftError: It is none.
        """
        if depth > _MAX_DEPTH:
            raise ThriftError("it is nested too deep")
        fields: dict[int, Any] = {}
        last = 0
        while head := self._byte():
            step = head >> 4
            last = last + step if step else self._integer()
            fields[last] = self._field(head & 0x0F, depth)
        return fields

    def _field(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):  # in a field, the type is the value
            return kind == _TRUE
        return self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self.read_bytes(self._varint())
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        if kind in (_LIST, _SET):
            return list(self._items(depth + 1))
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self.read_bytes(_EIGHT_BYTES)
        raise ThriftError(f"it has a field of type {kind}")  # maps: Parquet has none

    def _items(self, depth: int) -> Iterator[Any]:
        if depth > _MAX_DEPTH:
            raise ThriftError("it is nested too deep")
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        for _ in range(count):  # every item takes a byte or more
            yield self._value(head & 0x0F, depth)

    def _byte(self) -> int:
        place = self.offset
        if place >= self.stop:
            raise ThriftError("it is cut off")
        self.offset += 1
        return self.data[place]

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value, place = 0, self.offset
        for at in range(place, min(place + 10, self.stop)):
            byte = self.data[at]
            value |= (byte & 0x7F) << 7 * (at - place)
            if byte < 0x80:
                self.offset = at + 1
                return value
        raise ThriftError("it has a number that is cut off or of over 64 bits")
