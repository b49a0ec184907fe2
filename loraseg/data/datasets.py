"""The interface between labelled images and the code that uses them, whatever their layout.

A reader (one module in :mod:`loraseg.data.readers`) implements :class:`Dataset` for one layout.
Samples need not be files: a reader of Parquet or HDF5 puts row references into :class:`Sample`.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from loraseg.data.labels import LabelSpace
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = [
    "Dataset",
    "OpenFolder",
    "Reader",
    "Sample",
    "check_samples",
    "digest_samples",
    "load_pair",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a split, and its mask if the split has masks.

    Attributes:
        id: Unique within the split; choices by seed and digests depend on it.
        image: Reference to the image. Only the dataset interprets it; messages show it.
        mask: Reference to the mask; None for an unlabelled image.
    """

    id: str
    image: str
    mask: str | None


@runtime_checkable
class Dataset(Protocol):
    """Splits of images with label maps over one list of classes."""

    @property
    def location(self) -> str:
        """Path or URI, for messages."""
        ...

    @property
    def label_space(self) -> LabelSpace:
        """The classes."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, sorted."""
        ...

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(reference, reason) of each unusable sample left out so far, sorted."""
        ...

    def samples(self, split: str) -> tuple[Sample, ...]:
        """Return the samples of a split, sorted by id.

        Raises:
            DatasetError: The split does not exist, has no image, or an entry of it is unusable.
        """
        ...

    def load_image(self, sample: Sample) -> UInt8[ndarray, "h w 3"]:
        """Decode the image of a sample as RGB.

        Raises:
            DatasetError: The image cannot be read or decoded.
        """
        ...

    def load_label_map(self, sample: Sample) -> UInt8[ndarray, "h w"]:
        """Decode the mask of a sample: class ids of :attr:`label_space`, 255 = ignore.

        Raises:
            DatasetError: The sample has no mask, or the mask is broken or holds other ids.
        """
        ...

    def digest(self, sample: Sample) -> tuple[str, str | None]:
        """Return the sha256, hex, of the stored image and of the stored mask.

        Raises:
            DatasetError: The image or the mask cannot be read.
        """
        ...


@runtime_checkable
class OpenFolder(Protocol):
    """Opens a local folder of one layout."""

    def __call__(self, path: Path, *, skip_bad: bool) -> Dataset:
        """Open ``path``; with ``skip_bad``, unusable samples are left out and listed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One layout: an entry of :data:`loraseg.data.readers.READERS`.

    Attributes:
        layout: What the folder of a dataset contains, for messages.
        recognises: Whether the names at the top of a folder are those of this layout.
        is_dataset_key: Whether a file, named by its path in the folder, belongs to the dataset;
            the copy of a remote dataset has only these.
        open: Opens a local folder.
    """

    layout: str
    recognises: Callable[[Collection[str]], bool]
    is_dataset_key: Callable[[str], bool]
    open: OpenFolder


def load_pair(
    dataset: Dataset, sample: Sample
) -> tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w"]]:
    """Decode the image (RGB) and the label map (class ids, 255 = ignore) of a sample.

    Raises:
        DatasetError: One of them is broken, the sample has no mask, or their sizes differ.
    """
    image, label_map = dataset.load_image(sample), dataset.load_label_map(sample)
    if label_map.shape != image.shape[:2]:
        raise DatasetError(
            f"{sample.mask}: {label_map.shape[1]} x {label_map.shape[0]} pixels; expected "
            f"{image.shape[1]} x {image.shape[0]} as in its image {sample.image} "
            "(after its EXIF orientation)"
        )
    return image, label_map


def check_samples(dataset: Dataset, samples: Sequence[Sample]) -> None:
    """Decode every sample once, to find bad data before training starts.

    Raises:
        DatasetError: As in :func:`load_pair`, for the first bad sample; missing masks are allowed.
    """
    for sample in samples:
        if sample.mask is None:
            dataset.load_image(sample)
        else:
            load_pair(dataset, sample)


def digest_samples(dataset: Dataset, samples: Sequence[Sample]) -> str:
    """Return the sha256 over class names, sample ids and stored bytes, in any order of samples.

    Raises:
        DatasetError: An image or a mask cannot be read.
    """
    rows = [[sample.id, *dataset.digest(sample)] for sample in sorted(samples, key=lambda s: s.id)]
    text = json.dumps([dataset.label_space.names, rows], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
