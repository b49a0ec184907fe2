"""Batches of real and synthetic pairs for training closed-set segmenters, addressed by step.

The pairs of step s and their augmentation depend on the seed and s only, so a run that resumes at
any step, on any number of workers, sees the same batches. Memory holds an index and caches of
limited size, however large the data.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.utils.data

from loraseg.data import transforms
from loraseg.data.datasets import Dataset, Sample, load_pair
from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.shards.manifest import ShardEntry
from loraseg.data.shards.pictures import decode_pair
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow
from loraseg.errors import ConfigError, DatasetError
from loraseg.lru_cache import LruCache
from loraseg.seeding import numpy_generator
from loraseg.tensor_types import Float, UInt8, ndarray
from loraseg.train.closed_set.recipes import SegmenterRecipe

__all__ = [
    "ArrayPairs",
    "BatchDataset",
    "FolderPairs",
    "MixedSampler",
    "Pair",
    "PairSource",
    "ShardPairs",
    "class_shares",
]

Pair = tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w"]]
_COLUMNS = ("image", "label", "height", "width")
# Size of the shards that are in memory together; at least one shard is.
_WINDOW_BYTES = 256 * 2**20
_CACHE_BYTES = 256 * 2**20


@runtime_checkable
class PairSource(Protocol):
    """Labelled pairs in windows, which fit into memory, of blocks, which are read at once."""

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """Sizes of the blocks of each window."""
        ...

    def load(self, window: int, position: int) -> Pair:
        """Return a pair: RGB image and label map with 255 = ignore.

        Args:
            window: Index of the window.
            position: Position of the pair in the window.
        """
        ...


class ArrayPairs:
    """Pairs in memory."""

    def __init__(self, images: Sequence[ndarray], labels: Sequence[ndarray]) -> None:
        """Use the given pairs.

        Args:
            images: RGB, uint8 (h, w, 3).
            labels: Class ids, uint8 (h, w), one label map per image.

        Raises:
            DatasetError: There is no image, or the numbers differ.
        """
        if len(images) != len(labels) or not len(images):
            raise DatasetError(f"{len(images)} images and {len(labels)} labels: expected pairs")
        self._images, self._labels = images, labels
        self.windows = ((len(images),),)

    def load(self, window: int, position: int) -> Pair:
        """Return a pair."""
        del window
        return self._images[position], self._labels[position]


class FolderPairs:
    """Labelled samples of a dataset, with a cache of decoded pairs of up to 256 MiB."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample]) -> None:
        """Use samples of a dataset.

        Raises:
            DatasetError: There is no sample, or one has no mask.
        """
        unlabelled = [sample.id for sample in samples if sample.mask is None]
        if unlabelled or not samples:
            problem = f"sample {unlabelled[0]!r} has no mask" if unlabelled else "no samples"
            raise DatasetError(f"{dataset.location}: {problem}; expected labelled samples")
        self._dataset, self.samples = dataset, tuple(samples)
        self.windows = ((len(samples),),)
        self._cache: LruCache[int, Pair] = LruCache(
            _CACHE_BYTES, lambda pair: sum(array.nbytes for array in pair)
        )

    def load(self, window: int, position: int) -> Pair:
        """Return a pair.

        Raises:
            DatasetError: Its image or mask is broken.
        """
        del window
        return self._cache.get_or_create(
            position, lambda: load_pair(self._dataset, self.samples[position])
        )


class ShardPairs:
    """The ``ok`` pairs of synthetic datasets, with the class ids of the real data.

    A window is the shards that fit into 256 MiB. Pairs are drawn window by window, in an order that
    changes each epoch: a shard is read once per epoch, and memory does not grow with the data.
    """

    def __init__(self, datasets: Sequence[ShardDataset], label_space: LabelSpace) -> None:
        """Use all pairs of the datasets.

        Args:
            datasets: Datasets; their classes are matched by name.
            label_space: The classes to train; pixels of other classes are ignored.

        Raises:
            DatasetError: There is no pair, or a dataset shares no class with the label space.
        """
        self._datasets, self._label_space = tuple(datasets), label_space
        entries = [
            (index, entry)
            for index, dataset in enumerate(datasets)
            for entry in dataset.manifest.shards
            if entry.statuses["ok"]
        ]
        if not entries:
            raise DatasetError("synthetic data: no pair with status ok")
        self._windows = _group_into_windows(entries)
        self.windows = tuple(
            tuple(entry.statuses["ok"] for _, entry in window) for window in self._windows
        )
        self._remap_tables = [_remap_table(dataset, label_space) for dataset in self._datasets]
        self._loaded_window: tuple[int, list[tuple[int, PairRow]]] = (-1, [])

    def load(self, window: int, position: int) -> Pair:
        """Return a pair.

        Raises:
            IntegrityError: Its shard is missing or damaged.
            StoreError: The store cannot be read.
        """
        if self._loaded_window[0] != window:
            self._loaded_window = (-1, [])  # Free the old window before reading the new one.
            self._loaded_window = (window, self._read_window(window))
        index, row = self._loaded_window[1][position]
        dataset = self._datasets[index]
        image, label = decode_pair(row, len(dataset.classes), dataset.store.uri)
        return image, self._remap_tables[index][label]

    def _read_window(self, window: int) -> list[tuple[int, PairRow]]:
        return [
            (index, row)
            for index, entry in self._windows[window]
            for row in self._datasets[index].read_shard(entry, columns=_COLUMNS)
            if row.status == "ok"
        ]


def _group_into_windows(
    entries: Sequence[tuple[int, ShardEntry]],
) -> list[list[tuple[int, ShardEntry]]]:
    windows: list[list[tuple[int, ShardEntry]]] = []
    size_bytes = _WINDOW_BYTES
    for index, entry in entries:
        if size_bytes + entry.size_bytes > _WINDOW_BYTES:
            windows.append([])
            size_bytes = 0
        windows[-1].append((index, entry))
        size_bytes += entry.size_bytes
    return windows


def _remap_table(dataset: ShardDataset, label_space: LabelSpace) -> UInt8[ndarray, "256"]:
    table = dataset.classes.remap_table(label_space)
    if (table == IGNORE).all():
        raise DatasetError(
            f"{dataset.store.uri}: none of its classes ({', '.join(dataset.classes.names[:5])}, "
            f"...) is among {', '.join(label_space.names[:5])}, ..."
        )
    return table


class _ShuffledStream:
    """An endless sequence of shuffled epochs over all pairs."""

    def __init__(self, pairs: PairSource, seed: int, name: str) -> None:
        self._pairs, self._seed, self._name = pairs, seed, name
        self._sizes = np.array([sum(window) for window in pairs.windows])
        self._total = int(self._sizes.sum())
        # Orders of the current epoch and window; others are recomputed.
        self._epoch: tuple[int, ndarray, ndarray] | None = None
        self._window: tuple[int, int, ndarray] | None = None

    def pair_at(self, position: int) -> Pair:
        """Return the pair at a position of the sequence."""
        epoch, offset = divmod(position, self._total)
        order, ends = self._window_order(epoch)
        rank = int(np.searchsorted(ends, offset, side="right"))
        window = int(order[rank])
        offset_in_window = offset - int(ends[rank] - self._sizes[window])
        return self._pairs.load(window, int(self._pair_order(epoch, window)[offset_in_window]))

    def _window_order(self, epoch: int) -> tuple[ndarray, ndarray]:
        """Return the order of the windows, and the offset at which each of them ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = numpy_generator(self._seed, "windows", self._name, epoch)
            order = rng.permutation(len(self._sizes))
            self._epoch = (epoch, order, self._sizes[order].cumsum())
        return self._epoch[1:]

    def _pair_order(self, epoch: int, window: int) -> ndarray:
        if self._window is None or self._window[:2] != (epoch, window):
            rng = numpy_generator(self._seed, "pairs", self._name, epoch, window)
            self._window = (epoch, window, rng.permutation(int(self._sizes[window])))
        return self._window[2]


class MixedSampler:
    """Draws real and synthetic pairs at a fixed ratio.

    Both are endless sequences of shuffled epochs; step s takes the next pairs of each.
    """

    def __init__(
        self, recipe: SegmenterRecipe, real: PairSource, synthetic: PairSource | None, seed: int
    ) -> None:
        """Mix by ``recipe.synthetic_share``.

        Args:
            recipe: Batch size and share.
            real: Real pairs.
            synthetic: Synthetic pairs; None makes every batch real.
            seed: Seed of the orders.
        """
        count = 0 if synthetic is None else recipe.synthetic_images
        self._counts = (recipe.batch_size - count, count)
        self._streams = (
            _ShuffledStream(real, seed, "real"),
            None if synthetic is None else _ShuffledStream(synthetic, seed, "synthetic"),
        )

    def __len__(self) -> int:
        """Return the size of a batch."""
        return sum(self._counts)

    def is_synthetic(self, index: int) -> bool:
        """Return whether the pair at an index of a batch is synthetic."""
        return index >= self._counts[0]

    def pair(self, step: int, index: int) -> Pair:
        """Return the pair at an index of the batch of a step; real pairs come first.

        Raises:
            ConfigError: The index is beyond the batch.
        """
        kind = int(self.is_synthetic(index))
        stream = self._streams[kind]
        if stream is None:
            raise ConfigError(
                f"batch index {index}: the batch has {len(self)} pairs, all of them real"
            )
        return stream.pair_at(step * self._counts[kind] + index - kind * self._counts[0])


class BatchDataset(torch.utils.data.Dataset[tuple[Any, Any]]):
    """One rank's part of every batch, by step: augmented, as tensors."""

    def __init__(
        self, recipe: SegmenterRecipe, sampler: MixedSampler, seed: int, rank: int, world_size: int
    ) -> None:
        """Take the indices ``rank``, ``rank + world_size``, ... of each batch.

        Raises:
            ConfigError: The workers do not divide the batch.
        """
        if len(sampler) % world_size:
            raise ConfigError(
                f"batch_size {len(sampler)} cannot be split over {world_size} workers"
            )
        self._recipe, self._sampler, self._seed = recipe, sampler, seed
        self._indices = range(rank, len(sampler), world_size)

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._recipe.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images uint8 (b, s, s, 3) and labels int64 (b, s, s) of a step."""
        pairs = [self._augmented_pair(step, index) for index in self._indices]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        return images, torch.from_numpy(np.stack([label for _, label in pairs])).long()

    def _augmented_pair(self, step: int, index: int) -> Pair:
        recipe, rng = self._recipe, numpy_generator(self._seed, "augment", step, index)
        image, label = self._sampler.pair(step, index)
        scale = rng.uniform(*recipe.scales)
        shortest = recipe.shortest_edge or min(label.shape)
        edge = max(1, round(scale * shortest))
        image, label = transforms.resize_shortest_edge(image, label, edge)
        top, left = (int(rng.integers(0, max(side - recipe.crop, 0) + 1)) for side in label.shape)
        image, label = transforms.crop(image, label, top, left, recipe.crop)
        if recipe.jitter:
            image = transforms.jitter_colors(image, transforms.draw_jitter(rng))
        if rng.random() < recipe.flip:
            image, label = transforms.flip(image, label)
        return transforms.pad(image, label, recipe.crop)


def class_shares(pairs: PairSource, classes: int) -> Float[ndarray, " c"]:
    """Return the share of each class in all labelled pixels; zeros if no pixel is labelled."""
    counts = np.zeros(256, np.int64)
    for window, sizes in enumerate(pairs.windows):
        for position in range(sum(sizes)):
            counts += np.bincount(pairs.load(window, position)[1].ravel(), minlength=256)
    return counts[:classes] / max(1, int(counts[:classes].sum()))
