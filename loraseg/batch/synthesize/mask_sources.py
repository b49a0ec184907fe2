"""Masks as conditions: a dataset folder, a folder of PNG files, or Parquet, on any store."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby

from loraseg.batch.synthesize.conditions import ConditionRef
from loraseg.batch.synthesize.parquet_masks import ParquetMaskReader
from loraseg.data.labels import LabelSpace, parse_classes
from loraseg.data.masks import decode_mask
from loraseg.data.readers.names import image_stem, is_safe_stem
from loraseg.errors import ConfigError, DatasetError
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.storage.store import key_error
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import resize_mask
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MaskSource"]

_MAX_BATCH = 1024


class MaskSource:
    """The masks below a URI: a :class:`~loraseg.batch.synthesize.conditions.ConditionSource`."""

    def __init__(
        self,
        uri: str,
        classes: Sequence[str] = (),
        split: str = "train",
        size: tuple[int, int] | None = None,
    ) -> None:
        """Open the store; nothing is read.

        Args:
            uri: Store URI of the folder.
            classes: Class names; empty for those of ``classes.json``.
            split: Split of a dataset folder.
            size: Height and width that masks are resized to; None for their own size.

        Raises:
            ConfigError: The URI is malformed.
        """
        self.uri = uri
        self._classes, self._split, self._size = tuple(classes), split, size
        self._store = open_store(uri)
        self._parquet_reader = ParquetMaskReader(self._store)

    def label_space(self) -> LabelSpace:
        """Return the classes.

        Raises:
            ConfigError: None are given and there is no ``classes.json``.
            DatasetError: They are invalid.
            StoreError: The store cannot be read.
        """
        return self._label_space

    @cached_property
    def _label_space(self) -> LabelSpace:
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

    def list_conditions(self) -> list[ConditionRef]:
        """Return all masks in an order that depends on their names only.

        In a dataset folder the masks of training samples come first, in the order of
        :meth:`loraseg.data.Dataset.samples`, then those without an image. These, and masks in
        other layouts, are in code point order of their names.

        Raises:
            DatasetError: There is none, or a Parquet file is invalid.
            StoreError: The store cannot be read.
        """
        refs = self._png_masks() or sorted(self._parquet_masks())
        if not refs:
            raise DatasetError(
                f"{self.uri}: no masks; expected masks/{self._split}/*.png, *.png, or *.parquet "
                "with a column 'mask'"
            )
        return refs

    def read_batches(self, refs: Sequence[ConditionRef]) -> Iterator[Sequence[ConditionRef]]:
        """Yield batches of references; the masks of a Parquet file are not mixed with others."""
        ordered = sorted(refs, key=lambda ref: (ref.file, ref.row))
        for _, group in groupby(ordered, key=lambda ref: _is_parquet(ref.file) and ref.file):
            same_file = list(group)
            for start in range(0, len(same_file), _MAX_BATCH):
                yield same_file[start : start + _MAX_BATCH]

    def condition_id(self, ref: ConditionRef) -> str:
        """Return the digest of a mask's class ids, at the size of its images.

        Raises:
            DatasetError: As raised by :meth:`read`.
            StoreError: As raised by :meth:`read`.
        """
        return mask_digest(self.read(ref))

    def read(self, ref: ConditionRef) -> UInt8[ndarray, "h w"]:
        """Decode a mask to class ids or 255 and resize it (nearest neighbour).

        Raises:
            DatasetError: The file is damaged, missing, or its key invalid; or the mask has other
                ids.
            StoreError: The store cannot be read.
        """
        where = f"mask {ref.name!r}"
        if reason := key_error(ref.file):
            raise DatasetError(f"{where}: {reason}")
        try:
            if _is_parquet(ref.file):
                data = self._parquet_reader.mask(ref.file, ref.row)
            else:
                data = self._store.get(ref.file)
        except (ObjectNotFoundError, IndexError) as error:
            raise DatasetError(f"{where}: it is no longer in {self.uri}") from error
        if data is None:
            raise DatasetError(f"{where}: the row holds no mask")
        mask = decode_mask(data, where=where, classes=len(self.label_space()))
        return mask if self._size is None else resize_mask(mask, self._size)

    def _png_masks(self) -> list[ConditionRef]:
        folder = f"masks/{self._split}/"
        inside = [key for key in self._store.list(folder) if _is_png(key)]
        if inside:
            refs = [ConditionRef(key.removeprefix(folder), key) for key in inside]
            return self._training_order(refs, f"images/{self._split}/")
        flat = any(_is_png(key) and key.count("/") == 1 for key in self._store.list("masks/"))
        if not flat:
            keys = (key for key in self._store.list() if _is_png(key) and "/" not in key)
            return sorted(ConditionRef(key, key) for key in keys)
        # The layout with one list of stems per split.
        refs = [ConditionRef(f"{stem}.png", f"masks/{stem}.png") for stem in self._split_stems()]
        return self._training_order(refs, "images/")

    def _training_order(self, refs: list[ConditionRef], images: str) -> list[ConditionRef]:
        """Sort masks with an image by stem, like training samples, before those without."""
        names = (key.removeprefix(images) for key in self._store.list(images))
        stems = {stem for name in names if (stem := image_stem(name)) and is_safe_stem(name)}

        def sort_key(ref: ConditionRef) -> tuple[bool, str]:
            stem = ref.name.removesuffix(".png")
            has_image = stem != ref.name and stem in stems
            return not has_image, stem if has_image else ref.name

        return sorted(refs, key=sort_key)

    def _split_stems(self) -> set[str]:
        try:
            text = self._store.get(f"{self._split}.txt").decode("utf-8")
        except ObjectNotFoundError:
            return set()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.uri}/{self._split}.txt: not UTF-8 text") from error
        return {line.strip() for line in text.splitlines()} - {""}

    def _parquet_masks(self) -> Iterator[ConditionRef]:
        for key in filter(_is_parquet, self._store.list()):
            # The rows of a file with an invalid key are unknown; one reference reports the key.
            names = [key] if key_error(key) else self._parquet_reader.names(key)
            for row, name in enumerate(names):
                yield ConditionRef(name, key, row)


def _is_parquet(key: str) -> bool:
    return key.lower().endswith(".parquet")


def _is_png(key: str) -> bool:
    return key.lower().endswith(".png")
