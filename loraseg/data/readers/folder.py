"""The dataset folder: images and masks as files of equal stems, in two layouts.

- By folder: ``images/<split>/x.jpg|png`` and ``masks/<split>/x.png``.
- By list: ``images/x.jpg|png``, ``masks/x.png`` and ``<split>.txt`` with one stem per line.

If a split exists in both, the folder counts. ``classes.json`` names the classes. A split without
its mask folder is unlabelled; in one with masks, every image needs a mask.
"""

import hashlib
import itertools
import logging
from collections.abc import Collection
from pathlib import Path

from loraseg.data.datasets import Reader, Sample, check_samples
from loraseg.data.images import read_image
from loraseg.data.labels import LabelSpace, read_classes
from loraseg.data.masks import read_mask
from loraseg.data.readers.names import image_stem, is_safe_stem
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["FOLDER_READER", "DatasetFolder"]

logger = logging.getLogger(__name__)


class DatasetFolder:
    """A local dataset folder. Implements :class:`~loraseg.data.datasets.Dataset`.

    References of its samples are paths of files.
    """

    def __init__(self, path: Path, label_space: LabelSpace, *, skip_bad: bool = False) -> None:
        self.location = str(path)
        self.label_space = label_space
        self._path = path
        self._skip_bad = skip_bad
        self._skipped: dict[str, str] = {}
        self._samples: dict[str, tuple[Sample, ...]] = {}

    @classmethod
    def open(cls, path: Path, *, skip_bad: bool = False) -> "DatasetFolder":
        """Read the class list of a local folder.

        Args:
            path: The folder.
            skip_bad: Leave out unusable samples and list them in ``skipped``. Every file of a
                split is decoded when the split is first read.

        Raises:
            DatasetError: The class list is missing or unusable.
        """
        return cls(path, read_classes(path / "classes.json"), skip_bad=skip_bad)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(image path, reason) of the samples left out of the splits read so far, sorted."""
        return tuple(sorted(self._skipped.items()))

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, sorted."""
        entries = list((self._path / "images").iterdir())
        names = {entry.name for entry in entries if entry.is_dir()}
        if any(image_stem(entry.name) is not None for entry in entries):
            names |= {entry.stem for entry in self._path.glob("*.txt")}
        return tuple(sorted(names))

    def samples(self, split: str) -> tuple[Sample, ...]:
        """Return the samples of a split, sorted by id, which is the stem of their files.

        Raises:
            DatasetError: The split does not exist or has no usable image; its list has missing,
                duplicate or unsafe stems; an image has no mask; or two images share a stem.
        """
        if split not in self._samples:
            self._samples[split] = self._usable_samples(split)
        return self._samples[split]

    def load_image(self, sample: Sample) -> UInt8[ndarray, "h w 3"]:
        """Decode the image of a sample as RGB.

        Raises:
            DatasetError: The file is missing or broken.
        """
        return read_image(sample.image)

    def load_label_map(self, sample: Sample) -> UInt8[ndarray, "h w"]:
        """Decode the mask of a sample: class ids, 255 = ignore.

        Raises:
            DatasetError: There is no mask, the file is broken, or ids are outside the class list.
        """
        if sample.mask is None:
            raise DatasetError(f"{sample.image}: has no mask")
        return read_mask(sample.mask, classes=len(self.label_space))

    def digest(self, sample: Sample) -> tuple[str, str | None]:
        """Return the sha256, hex, of the image file and of the mask file.

        Raises:
            DatasetError: A file cannot be read.
        """
        return _file_digest(sample.image), sample.mask and _file_digest(sample.mask)

    def _usable_samples(self, split: str) -> tuple[Sample, ...]:
        usable: list[Sample] = []
        for path, sample in self._list_split(split):
            try:
                if isinstance(sample, DatasetError):
                    raise sample
                if self._skip_bad:
                    check_samples(self, [sample])
            except DatasetError as error:
                if not self._skip_bad:
                    raise
                self._skipped[str(path)] = str(error)
                logger.warning("skipped: %s", error)
            else:
                usable.append(sample)
        if not usable:
            raise DatasetError(f"{self.location}: split {split!r} has no usable image")
        return tuple(usable)

    def _list_split(self, split: str) -> list[tuple[Path, Sample | DatasetError]]:
        """Return (image path, sample or error) for each image of a split, sorted by id."""
        _check_stem(split, self._path)
        folder, list_file = self._path / "images" / split, self._path / f"{split}.txt"
        if folder.is_dir():
            images, masks = _images_by_stem(folder), self._path / "masks" / split
            stems = sorted(images)
        elif list_file.is_file():
            images, masks = _images_by_stem(folder.parent), self._path / "masks"
            stems = _read_stems(list_file)
        else:
            raise DatasetError(
                f"{self.location}: no split {split!r}: neither images/{split}/ nor {split}.txt "
                f"(splits: {', '.join(self.splits) or 'none'})"
            )
        return [_find_sample(stem, images, masks, list_file) for stem in stems]


def _has_images_folder(names: Collection[str]) -> bool:
    return "images" in names


def _is_dataset_key(key: str) -> bool:
    if key.endswith("/"):  # the marker object that some tools write for an empty folder
        return False
    top, _, rest = key.partition("/")
    return top in ("images", "masks") if rest else top == "classes.json" or top.endswith(".txt")


FOLDER_READER = Reader(
    layout="a folder 'images' and classes.json",
    recognises=_has_images_folder,
    is_dataset_key=_is_dataset_key,
    open=DatasetFolder.open,
)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if (stem := image_stem(path.name)) is None:
            continue
        if (other := images.get(stem)) is not None:
            raise DatasetError(f"{path}: {other.name} has the same stem; they would share a mask")
        images[stem] = path
    return images


def _read_stems(path: Path) -> list[str]:
    try:
        stems = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: expected UTF-8 text: {error}") from error
    stems = sorted(stem for stem in stems if stem)
    for before, stem in itertools.pairwise(stems):
        if before == stem:
            raise DatasetError(f"{path}: stem {stem!r} is listed twice")
    return stems


def _find_sample(
    stem: str, images: dict[str, Path], masks: Path, list_file: Path
) -> tuple[Path, Sample | DatasetError]:
    try:
        _check_stem(stem, list_file)
        if stem not in images:
            raise DatasetError(f"{list_file}: stem {stem!r} has no image in images/")
    except DatasetError as error:
        return list_file.parent / "images" / stem, error
    image, mask = images[stem], masks / f"{stem}.png"
    if not masks.is_dir():
        return image, Sample(stem, str(image), None)
    if not mask.is_file():
        return image, DatasetError(f"{image}: no mask; expected it at {mask}")
    return image, Sample(stem, str(image), str(mask))


def _check_stem(stem: str, where: Path) -> None:
    """Refuse a stem that would leave the folder or is not printable."""
    if not is_safe_stem(stem):
        raise DatasetError(f"{where}: {stem!r} is not a plain file name")


def _file_digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
