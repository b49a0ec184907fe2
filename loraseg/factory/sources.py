"""Where masks come from: a dataset folder, a folder of PNG files, or Parquet, on any store."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.labels import LabelSpace, parse_classes
from loraseg.data.masks import decode_mask
from loraseg.errors import ConfigError, DatasetError
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MaskSource", "Named", "open_masks"]

_MOST_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Named:
    """A mask of a source.

    Attributes:
        name: What people call it: the file's key, or the row's name.
        file: Key of the object that holds it.
        row: Which row of a Parquet file; 0 for a PNG.
    """

    name: str
    file: str
    row: int = 0


class MaskSource:
    """Masks below a URI; :func:`open_masks` opens it. Can be pickled before its first use."""

    def __init__(self, uri: str, classes: Sequence[str], split: str) -> None:
        """Note where the masks are; nothing is read yet.

        Args:
            uri: Of the folder.
            classes: Class names; empty for those of ``classes.json``.
            split: Of a dataset folder.
        """
        self.uri = uri
        self._classes, self._split = tuple(classes), split
        self._store: ObjectStore = open_store(uri)
        self._table: tuple[str, list[bytes | None]] | None = None

    def label_space(self) -> LabelSpace:
        """Return the classes.

        Raises:
            ConfigError: None are given and there is no ``classes.json``.
            DatasetError: They are unusable.
        """
        if self._classes:
            return LabelSpace(self._classes)
        try:
            data = self._store.get("classes.json")
        except ObjectNotFoundError as error:
            raise ConfigError(
                f"classes: {self.uri} has no classes.json; expected the class names in the order "
                "of the ids"
            ) from error
        return parse_classes(data, f"{self.uri}/classes.json")

    def names(self) -> list[Named]:
        """Return all masks in code point order of their names.

        Raises:
            DatasetError: There is none, or a Parquet file is unusable.
        """
        found = list(self._png()) or list(self._parquet())
        if not found:
            raise DatasetError(
                f"{self.uri}: no masks; expected masks/{self._split}/*.png, *.png, or *.parquet "
                "with a column 'mask'"
            )
        return sorted(found, key=lambda one: (one.name, one.file, one.row))

    def read(self, mask: Named, *, classes: int) -> UInt8[ndarray, "h w"]:
        """Decode a mask: class ids below ``classes``, or 255.

        Raises:
            DatasetError: It is broken, holds other ids, or has gone.
            StoreError: The store cannot be read.
        """
        try:
            data = self._column(mask.file)[mask.row] if _is_parquet(mask.file) else self._get(mask)
        except (ObjectNotFoundError, IndexError) as error:
            raise DatasetError(f"mask {mask.name!r}: it has gone from {self.uri}") from error
        if data is None:
            raise DatasetError(f"mask {mask.name!r}: the row holds no mask")
        return decode_mask(data, where=f"mask {mask.name!r}", classes=classes)

    def _get(self, mask: Named) -> bytes:
        return self._store.get(mask.file)

    def _png(self) -> Iterator[Named]:
        folder = f"masks/{self._split}/"
        inside = [key for key in self._store.list(folder) if _is_png(key)]
        if inside:
            yield from (Named(key.removeprefix(folder), key) for key in inside)
            return
        flat = {key for key in self._store.list("masks/") if _is_png(key) and key.count("/") == 1}
        if flat and (stems := self._listed()) is not None:
            # The layout with one list a split.
            yield from (Named(f"{stem}.png", f"masks/{stem}.png") for stem in stems)
            return
        if not flat:
            keys = (key for key in self._store.list() if _is_png(key) and "/" not in key)
            yield from (Named(key, key) for key in keys)

    def _listed(self) -> list[str] | None:
        try:
            text = self._store.get(f"{self._split}.txt").decode("utf-8")
        except ObjectNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.uri}/{self._split}.txt: not UTF-8 text") from error
        return sorted({line.strip() for line in text.splitlines()} - {""})

    def _parquet(self) -> Iterator[Named]:
        for key in self._store.list():
            if _is_parquet(key):
                table = self._open(key, ["name"])
                names = table.column("name").to_pylist() if "name" in table.column_names else None
                for row in range(table.num_rows):
                    yield Named(str(names[row]) if names else f"{key}#{row}", key, row)

    def _column(self, key: str) -> list[bytes | None]:
        """Return a file's masks; the last file is remembered, since a part reads its neighbours."""
        # Threads read at the same time: what one of them holds no other may swap.
        known = self._table
        if known is None or known[0] != key:
            table = self._open(key, ["mask"])
            if "mask" not in table.column_names:
                raise DatasetError(f"{self.uri}/{key}: no column 'mask' of PNG bytes")
            known = key, [_png_bytes(value) for value in table.column("mask").to_pylist()]
            self._table = known
        return known[1]

    def _open(self, key: str, columns: list[str]) -> pa.Table:
        data = self._store.get(key)
        try:
            file = pq.ParquetFile(io.BytesIO(data))
            size = sum(
                file.metadata.row_group(index).total_byte_size
                for index in range(file.metadata.num_row_groups)
            )
            if size > _MOST_BYTES:
                raise DatasetError(f"{self.uri}/{key}: {size} bytes unpacked, at most 256 MiB")
            known = [name for name in columns if name in file.schema_arrow.names]
            table = file.read(known)
            # A column of nothing keeps the number of rows.
            return table if known else pa.table({"": pa.nulls(file.metadata.num_rows)})
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{self.uri}/{key}: not a Parquet file: {error}") from error


def open_masks(uri: str, classes: Sequence[str] = (), split: str = "train") -> MaskSource:
    """Open the masks below a URI.

    Raises:
        ConfigError: The URI is malformed.
    """
    return MaskSource(uri, classes, split)


def _png_bytes(value: Any) -> bytes | None:
    """Return the bytes of a cell: plain, or in the struct that Hugging Face keeps images in."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _is_png(key: str) -> bool:
    return key.lower().endswith(".png")


def _is_parquet(key: str) -> bool:
    return key.lower().endswith(".parquet")
