"""A second reader: images and label maps in memory, without files."""

import hashlib

import numpy as np

from loraseg.data import LabelSpace, Sample
from loraseg.errors import DatasetError


class MemoryDataset:
    """Implements ``loraseg.data.Dataset`` over arrays; references are row numbers."""

    location = "memory"
    skipped = ()

    def __init__(self, classes, splits):
        """Take the class names and, per split, lists of (image, label map or None)."""
        self.label_space = LabelSpace(tuple(classes))
        self._rows, self._samples = [], {}
        for split, rows in splits.items():
            samples = []
            for image, label_map in rows:
                reference = f"row {len(self._rows)}"
                mask = None if label_map is None else reference
                samples.append(Sample(f"{len(samples):04d}", reference, mask))
                self._rows.append((image, label_map))
            self._samples[split] = tuple(samples)

    @property
    def splits(self):
        return tuple(sorted(self._samples))

    def samples(self, split):
        if split not in self._samples:
            raise DatasetError(f"memory: no split {split!r}")
        return self._samples[split]

    def load_image(self, sample):
        return self._row(sample.image)[0]

    def load_label_map(self, sample):
        if sample.mask is None:
            raise DatasetError(f"{sample.image}: has no mask")
        return self._row(sample.mask)[1]

    def digest(self, sample):
        image, label_map = self._row(sample.image)
        return _sha256(image), None if label_map is None else _sha256(label_map)

    def _row(self, reference):
        return self._rows[int(reference.removeprefix("row "))]


def memory_copy(dataset):
    """Return the splits of another dataset in memory."""
    splits = {
        split: [
            (
                dataset.load_image(sample),
                None if sample.mask is None else dataset.load_label_map(sample),
            )
            for sample in dataset.samples(split)
        ]
        for split in dataset.splits
    }
    return MemoryDataset(dataset.label_space.names, splits)


def _sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
