"""Where masks come from: a dataset folder, a folder of PNG files, or Parquet, on any store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraseg.batch.synthesize.parquet_masks import ParquetMaskReader
from loraseg.data.labels import LabelSpace, parse_classes
from loraseg.data.masks import decode_mask
from loraseg.data.readers.names import image_stem, is_safe_stem
from loraseg.errors import ConfigError, DatasetError
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store
from loraseg.storage.store import key_error
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MaskRef", "MaskSource", "is_parquet", "open_mask_source"]


@dataclass(frozen=True, slots=True, order=True)
class MaskRef:
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
        self._parquet_reader = ParquetMaskReader(self._store)

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

    def list_masks(self) -> list[MaskRef]:
        """Return all masks in an order that depends on nothing but their names.

        Of a dataset folder first those with an image, in the order of the training samples
        (:meth:`loraseg.data.Dataset.samples`), then the others; these, and all masks that
        lie otherwise, in code point order of their names.

        Raises:
            DatasetError: There is none, or a Parquet file is unusable.
            StoreError: The store cannot be read.
        """
        found = self._png_masks() or sorted(self._parquet_masks())
        if not found:
            raise DatasetError(
                f"{self.uri}: no masks; expected masks/{self._split}/*.png, *.png, or *.parquet "
                "with a column 'mask'"
            )
        return found

    def read(self, ref: MaskRef, *, classes: int) -> UInt8[ndarray, "h w"]:
        """Decode a mask: class ids below ``classes``, or 255.

        Raises:
            DatasetError: It is broken, holds other ids, has gone, or has a key that no store
                would take.
            StoreError: The store cannot be read.
        """
        where = f"mask {ref.name!r}"
        if reason := key_error(ref.file):
            raise DatasetError(f"{where}: {reason}")
        try:
            if is_parquet(ref.file):
                data = self._parquet_reader.mask(ref.file, ref.row)
            else:
                data = self._store.get(ref.file)
        except (ObjectNotFoundError, IndexError) as error:
            raise DatasetError(f"{where}: it has gone from {self.uri}") from error
        if data is None:
            raise DatasetError(f"{where}: the row holds no mask")
        return decode_mask(data, where=where, classes=classes)

    def _png_masks(self) -> list[MaskRef]:
        folder = f"masks/{self._split}/"
        inside = [key for key in self._store.list(folder) if _is_png(key)]
        if inside:
            found = [MaskRef(key.removeprefix(folder), key) for key in inside]
            return self._training_order(found, f"images/{self._split}/")
        flat = any(_is_png(key) and key.count("/") == 1 for key in self._store.list("masks/"))
        if not flat:
            keys = (key for key in self._store.list() if _is_png(key) and "/" not in key)
            return sorted(MaskRef(key, key) for key in keys)
        # The layout with one list a split.
        found = [MaskRef(f"{stem}.png", f"masks/{stem}.png") for stem in self._split_stems()]
        return self._training_order(found, "images/")

    def _training_order(self, masks: list[MaskRef], images: str) -> list[MaskRef]:
        """Sort masks like the training samples, which go by stem, and then those without image."""
        names = (key.removeprefix(images) for key in self._store.list(images))
        stems = {stem for name in names if (stem := image_stem(name)) and is_safe_stem(name)}

        def place(mask: MaskRef) -> tuple[bool, str]:
            stem = mask.name.removesuffix(".png")
            trained = stem != mask.name and stem in stems
            return not trained, stem if trained else mask.name

        return sorted(masks, key=place)

    def _split_stems(self) -> set[str]:
        try:
            text = self._store.get(f"{self._split}.txt").decode("utf-8")
        except ObjectNotFoundError:
            return set()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.uri}/{self._split}.txt: not UTF-8 text") from error
        return {line.strip() for line in text.splitlines()} - {""}

    def _parquet_masks(self) -> Iterator[MaskRef]:
        for key in filter(is_parquet, self._store.list()):
            # How many rows it has nobody can know, but that it is there must be told.
            names = [key] if key_error(key) else self._parquet_reader.names(key)
            for row, name in enumerate(names):
                yield MaskRef(name, key, row)


def open_mask_source(uri: str, classes: Sequence[str] = (), split: str = "train") -> MaskSource:
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
