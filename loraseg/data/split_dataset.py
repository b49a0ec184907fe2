"""One split of a dataset for torch's DataLoader."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from loraseg.data.datasets import Dataset, load_pair
from loraseg.data.readers.opening import open_dataset

__all__ = ["SplitDataset"]


class SplitDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The labelled images of one split, as a map-style torch dataset.

    Items are ``image`` uint8
    (h, w, 3) RGB, ``label`` uint8 (h, w) with 255 = ignore, and ``id``. Sizes may differ between
    items; batches of several images need a ``collate_fn``.
    """

    def __init__(self, dataset: Dataset | str | Path, split: str = "train") -> None:
        """Open a split.

        Args:
            dataset: The dataset, or its path or URI.
            split: Name of the split.

        Raises:
            DatasetError: The dataset or the split does not exist or is unusable.
            StoreError: The store cannot be read.
        """
        super().__init__()
        self.dataset = open_dataset(dataset) if isinstance(dataset, str | Path) else dataset
        self.samples = self.dataset.samples(split)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode one item.

        Raises:
            DatasetError: The image or the mask is broken, or the sample has no mask.
        """
        sample = self.samples[index]
        # Readers may return read-only arrays, for which torch prints a warning.
        image, label = (
            np.require(array, requirements="W") for array in load_pair(self.dataset, sample)
        )
        return {"image": image, "label": label, "id": sample.id}
