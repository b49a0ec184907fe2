"""Where masks come from: a dataset folder, a folder of PNG files, or Parquet, on any store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraseg.data.labels import LabelSpace, parse_classes
from loraseg.data.masks import decode_mask
from loraseg.data.readers.stems import image_stem, is_plain
from loraseg.errors import ConfigError, DatasetError
from loraseg.factory.parquet_masks import ParquetMasks
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.storage.store import key_fault
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MaskSource", "Named", "is_parquet", "open_masks"]


@dataclass(frozen=True, slots=True, order=True)
class Named:
    """A mask of a source; two may share a name, but not file and row.

    Attributes:
        name: What people call it: the file's key, or the row's name.
        file: Key of the object that holds it.
        row: Which row of a Parquet file; 0 for a PNG.
    """

    name: str
    file: str
    row: int = 0


class MaskSource:
    """Masks below a URI; :func:`open_masks` opens it. Threads may share it."""

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
        self._parquet = ParquetMasks(self._store)

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
        """Return all masks in an order that depends on nothing but their names.

        Of a dataset folder first those with an image, in the order of the training samples
        (:meth:`loraseg.data.DatasetFolder.samples`), then the others; these, and all masks that
        lie otherwise, in code point order of their names.

        Raises:
            DatasetError: There is none, or a Parquet file is unusable.
            StoreError: The store cannot be read.
        """
        found = self._png() or sorted(self._rows())
        if not found:
            raise DatasetError(
                f"{self.uri}: no masks; expected masks/{self._split}/*.png, *.png, or *.parquet "
                "with a column 'mask'"
            )
        return found

    def read(self, mask: Named, *, classes: int) -> UInt8[ndarray, "h w"]:
        """Decode a mask: class ids below ``classes``, or 255.

        Raises:
            DatasetError: It is broken, holds other ids, has gone, or has a key that no store
                would take.
            StoreError: The store cannot be read.
        """
        where = f"mask {mask.name!r}"
        if reason := key_fault(mask.file):
            raise DatasetError(f"{where}: {reason}")
        try:
            if is_parquet(mask.file):
                data = self._parquet.mask(mask.file, mask.row)
            else:
                data = self._store.get(mask.file)
        except (ObjectNotFoundError, IndexError) as error:
            raise DatasetError(f"{where}: it has gone from {self.uri}") from error
        if data is None:
            raise DatasetError(f"{where}: the row holds no mask")
        return decode_mask(data, where=where, classes=classes)

    def _png(self) -> list[Named]:
        folder = f"masks/{self._split}/"
        inside = [key for key in self._store.list(folder) if _is_png(key)]
        if inside:
            found = [Named(key.removeprefix(folder), key) for key in inside]
            return self._as_trained(found, f"images/{self._split}/")
        flat = any(_is_png(key) and key.count("/") == 1 for key in self._store.list("masks/"))
        if not flat:
            keys = (key for key in self._store.list() if _is_png(key) and "/" not in key)
            return sorted(Named(key, key) for key in keys)
        # The layout with one list a split.
        found = [Named(f"{stem}.png", f"masks/{stem}.png") for stem in self._listed()]
        return self._as_trained(found, "images/")

    def _as_trained(self, masks: list[Named], images: str) -> list[Named]:
        """Sort masks like the training samples, which go by stem, and then those without image."""
        names = (key.removeprefix(images) for key in self._store.list(images))
        stems = {stem for name in names if (stem := image_stem(name)) and is_plain(name)}

        def place(mask: Named) -> tuple[bool, str]:
            stem = mask.name.removesuffix(".png")
            trained = stem != mask.name and stem in stems
            return not trained, stem if trained else mask.name

        return sorted(masks, key=place)

    def _listed(self) -> set[str]:
        try:
            text = self._store.get(f"{self._split}.txt").decode("utf-8")
        except ObjectNotFoundError:
            return set()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.uri}/{self._split}.txt: not UTF-8 text") from error
        return {line.strip() for line in text.splitlines()} - {""}

    def _rows(self) -> Iterator[Named]:
        for key in filter(is_parquet, self._store.list()):
            # How many rows it has nobody can know, but that it is there must be told.
            names = [key] if key_fault(key) else self._parquet.names(key)
            for row, name in enumerate(names):
                yield Named(name, key, row)


def open_masks(uri: str, classes: Sequence[str] = (), split: str = "train") -> MaskSource:
    """Open the masks below a URI.

    Raises:
        ConfigError: The URI is malformed.
    """
    return MaskSource(uri, classes, split)


def is_parquet(key: str) -> bool:
    """Return whether the object under a key holds many masks."""
    return key.lower().endswith(".parquet")


def _is_png(key: str) -> bool:
    return key.lower().endswith(".png")
