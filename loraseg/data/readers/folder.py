"""The dataset folder, in two layouts.

By folder: ``images/<split>/x.jpg|png`` with ``masks/<split>/x.png``. By list: ``images/x.jpg|png``
with ``masks/x.png`` and one stem a line in ``<split>.txt``. Where both forms of a split exist, the
folder counts. ``classes.json`` names the classes. Without its mask folder a split is unlabelled;
with one, every image needs a mask.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loraseg.data.images import read_image
from loraseg.data.labels import LabelSpace, read_classes
from loraseg.data.masks import read_mask
from loraseg.data.readers.names import image_stem, is_safe_stem
from loraseg.data.readers.remote import download_to_cache
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["DatasetFolder", "Sample"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image and its mask, if the split has masks; ``id`` is the files' common stem."""

    id: str
    image: Path
    mask: Path | None


class DatasetFolder:
    """A dataset folder, opened with :meth:`open`.

    Attributes:
        path: The local folder.
        label_space: The classes of ``classes.json``.
    """

    def __init__(self, path: Path, label_space: LabelSpace, *, skip_bad: bool = False) -> None:
        self.path = path
        self.label_space = label_space
        self._skip_bad = skip_bad
        self._skipped: dict[Path, str] = {}
        self._samples: dict[str, tuple[Sample, ...]] = {}

    @classmethod
    def open(cls, path: str | Path, *, skip_bad: bool = False) -> "DatasetFolder":
        """Open a folder given by path, ``file://`` or ``s3://`` URI (copied to a local cache).

        Args:
            path: Where the folder is.
            skip_bad: Leave out samples that cannot be used, and list them in ``skipped``. It
                decodes every file of a split when the split is first asked for.

        Raises:
            DatasetError: There is no such folder, or its class list cannot be read.
            StoreError: The store of an ``s3://`` URI cannot be read.
        """
        folder = _local_folder(path)
        if not (folder / "images").is_dir():
            raise DatasetError(f"{folder}: no folder 'images' in it; not a dataset folder")
        return cls(folder, read_classes(folder / "classes.json"), skip_bad=skip_bad)

    @property
    def skipped(self) -> tuple[tuple[Path, str], ...]:
        """What ``skip_bad`` left out of the splits asked for so far: (file, reason), sorted."""
        return tuple(sorted(self._skipped.items()))

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, sorted."""
        entries = list((self.path / "images").iterdir())
        names = {entry.name for entry in entries if entry.is_dir()}
        if any(image_stem(entry.name) is not None for entry in entries):
            names |= {entry.stem for entry in self.path.glob("*.txt")}
        return tuple(sorted(names))

    def samples(self, split: str) -> tuple[Sample, ...]:
        """Return the samples of a split, sorted by id.

        Raises:
            DatasetError: There is no such split, it has no (usable) image, its list names absent,
                double or unsafe stems, an image has no mask or two images share a stem.
        """
        if split not in self._samples:
            self._samples[split] = self._usable_samples(split)
        return self._samples[split]

    def load(self, sample: Sample) -> tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w"] | None]:
        """Decode a sample: image in RGB and mask of class ids, 255 = ignore.

        Raises:
            DatasetError: A file is broken, or the mask has another size or ids outside the list.
        """
        image = read_image(sample.image)
        if sample.mask is None:
            return image, None
        mask = read_mask(sample.mask, classes=len(self.label_space))
        if mask.shape != image.shape[:2]:
            raise DatasetError(
                f"{sample.mask}: {mask.shape[1]} x {mask.shape[0]} pixels; expected "
                f"{image.shape[1]} x {image.shape[0]} as in its image {sample.image.name} "
                "(after its EXIF orientation)"
            )
        return image, mask

    def check(self, samples: Sequence[Sample]) -> None:
        """Decode every sample once, so that bad files show before long work starts.

        Raises:
            DatasetError: As in :meth:`load`, for the first bad sample.
        """
        for sample in samples:
            self.load(sample)

    def digest(self, samples: Sequence[Sample]) -> str:
        """Return the sha256 over class names, ids and file bytes; the samples' order is free.

        Raises:
            DatasetError: A file cannot be read.
        """
        rows = [
            [sample.id, _file_digest(sample.image), sample.mask and _file_digest(sample.mask)]
            for sample in sorted(samples, key=lambda sample: sample.id)
        ]
        text = json.dumps([self.label_space.names, rows], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _usable_samples(self, split: str) -> tuple[Sample, ...]:
        usable: list[Sample] = []
        for path, found in self._list_split(split):
            try:
                if isinstance(found, DatasetError):
                    raise found
                if self._skip_bad:
                    self.load(found)
            except DatasetError as error:
                if not self._skip_bad:
                    raise
                self._skipped[path] = str(error)
                logger.warning("skipped: %s", error)
            else:
                usable.append(found)
        if not usable:
            raise DatasetError(f"{self.path}: split {split!r} has no usable image")
        return tuple(usable)

    def _list_split(self, split: str) -> list[tuple[Path, Sample | DatasetError]]:
        """List a split's images, sorted by id, each with its sample or why it has none."""
        _check_stem(split, self.path)
        folder, list_file = self.path / "images" / split, self.path / f"{split}.txt"
        if folder.is_dir():
            images, masks = _images_by_stem(folder), self.path / "masks" / split
            stems = sorted(images)
        elif list_file.is_file():
            images, masks = _images_by_stem(folder.parent), self.path / "masks"
            stems = _read_stems(list_file)
        else:
            raise DatasetError(
                f"{self.path}: no split {split!r}: neither images/{split}/ nor {split}.txt "
                f"(splits: {', '.join(self.splits) or 'none'})"
            )
        return [_find_sample(stem, images, masks, list_file) for stem in stems]


def _local_folder(path: str | Path) -> Path:
    text = str(path)
    scheme = urlsplit(text).scheme
    if scheme == "s3":
        from loraseg.storage import open_store  # brings boto3, which local folders do without

        return download_to_cache(open_store(text))
    return Path(unquote(urlsplit(text).path)) if scheme == "file" else Path(text)


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
        return image, Sample(stem, image, None)
    if not mask.is_file():
        return image, DatasetError(f"{image}: no mask; expected it at {mask}")
    return image, Sample(stem, image, mask)


def _check_stem(stem: str, where: Path) -> None:
    """Refuse what would leave the folder or cannot be written down as UTF-8."""
    if not is_safe_stem(stem):
        raise DatasetError(f"{where}: {stem!r} is not a plain file name")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
