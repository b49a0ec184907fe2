"""What closed-set segmenters learn from: labelled pairs, real and synthetic, addressed by step.

Which pairs the batch of step s holds, and how each is cropped, follows from the seed and s alone: a
training that is resumed at any step, on any number of workers, sees the batches that it would have
seen. Memory holds an index and a bounded cache, however large the data.
"""

from collections import OrderedDict
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
# Shards that are drawn from at a time, and so kept: as many as fit, at least one.
_WINDOW_BYTES = 256 * 2**20
_CACHE_BYTES = 256 * 2**20


@runtime_checkable
class PairSource(Protocol):
    """Labelled pairs in blocks; a block is what is cheap to read together."""

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """Sizes of the blocks, grouped by what may be in memory at a time."""
        ...

    def load(self, window: int, position: int) -> Pair:
        """Return a pair by its place among the window's, image RGB and label with 255 = ignore."""
        ...


class ArrayPairs:
    """Pairs in memory."""

    def __init__(self, images: Sequence[ndarray], labels: Sequence[ndarray]) -> None:
        """Use images uint8 (h, w, 3) and as many labels uint8 (h, w) of class ids.

        Raises:
            DatasetError: None, or not as many of both.
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
    """The labelled samples of a dataset folder; the decoded ones are kept up to 256 MiB."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample]) -> None:
        """Use some samples of a folder.

        Raises:
            DatasetError: There is none, or one has no mask.
        """
        bare = [sample.id for sample in samples if sample.mask is None]
        if bare or not samples:
            what = f"sample {bare[0]!r} has no mask" if bare else "no samples"
            raise DatasetError(f"{dataset.location}: {what}; expected labelled ones")
        self._dataset, self.samples = dataset, tuple(samples)
        self.windows = ((len(samples),),)
        self._cache: OrderedDict[int, Pair] = OrderedDict()
        self._cache_bytes = 0

    def load(self, window: int, position: int) -> Pair:
        """Return a pair.

        Raises:
            DatasetError: A file of it cannot be used.
        """
        del window
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position]
        image, mask = load_pair(self._dataset, self.samples[position])
        self._cache[position] = image, mask
        self._cache_bytes += image.nbytes + mask.nbytes
        while self._cache_bytes > _CACHE_BYTES:
            self._cache_bytes -= sum(old.nbytes for old in self._cache.popitem(last=False)[1])
        return image, mask


class ShardPairs:
    """The ``ok`` pairs of synthetic datasets, in the classes of the real data.

    They are drawn window by window: so many shards as fit into 256 MiB, in an order that changes
    each epoch, so that a shard is read once an epoch and memory does not grow with the data.
    """

    def __init__(self, datasets: Sequence[ShardDataset], label_space: LabelSpace) -> None:
        """Use all pairs of the datasets.

        Args:
            datasets: Their classes are matched by name.
            label_space: The classes to tell; pixels of any other are ignored.

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
            raise DatasetError("synthetic data: no pair that could be trained on")
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
            self._loaded_window = (-1, [])  # the old one goes before the new one comes
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
    """All pairs, again and again, each epoch in an order of its own."""

    def __init__(self, pairs: PairSource, seed: int, name: str) -> None:
        self._pairs, self._seed, self._name = pairs, seed, name
        self._sizes = np.array([sum(window) for window in pairs.windows])
        self._total = int(self._sizes.sum())
        # Of the epoch and window at hand; what comes before or after is drawn again at need.
        self._epoch: tuple[int, ndarray, ndarray] | None = None
        self._window: tuple[int, int, ndarray] | None = None

    def pair_at(self, position: int) -> Pair:
        """Return the pair at a position of the endless stream."""
        epoch, place = divmod(position, self._total)
        order, ends = self._window_order(epoch)
        slot = int(np.searchsorted(ends, place, side="right"))
        window = int(order[slot])
        inside = place - int(ends[slot] - self._sizes[window])
        return self._pairs.load(window, int(self._pair_order(epoch, window)[inside]))

    def _window_order(self, epoch: int) -> tuple[ndarray, ndarray]:
        """Return the order of the windows, and the places at which each of them ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            drawn = numpy_generator(self._seed, "windows", self._name, epoch)
            order = drawn.permutation(len(self._sizes))
            self._epoch = (epoch, order, self._sizes[order].cumsum())
        return self._epoch[1:]

    def _pair_order(self, epoch: int, window: int) -> ndarray:
        if self._window is None or self._window[:2] != (epoch, window):
            drawn = numpy_generator(self._seed, "pairs", self._name, epoch, window)
            self._window = (epoch, window, drawn.permutation(int(self._sizes[window])))
        return self._window[2]


class MixedSampler:
    """Draws real and synthetic pairs at a fixed ratio, without doubling any data (methods a.5).

    Both are endless shuffled streams; step s takes the next pairs of each.
    """

    def __init__(
        self, recipe: SegmenterRecipe, real: PairSource, synthetic: PairSource | None, seed: int
    ) -> None:
        """Mix by ``recipe.synthetic_share``; without synthetic pairs every batch is real."""
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
        """Whether the pair at a place of any batch is synthetic."""
        return index >= self._counts[0]

    def pair(self, step: int, index: int) -> Pair:
        """Return the pair at a place of a batch, the real ones first."""
        kind = int(self.is_synthetic(index))
        stream = self._streams[kind]
        if stream is None:
            raise ConfigError(f"batch place {index}: there are {len(self)}, all of them real")
        return stream.pair_at(step * self._counts[kind] + index - kind * self._counts[0])


class BatchDataset(torch.utils.data.Dataset[tuple[Any, Any]]):
    """The share of one rank of every batch, by step: augmented, as tensors."""

    def __init__(
        self, recipe: SegmenterRecipe, sampler: MixedSampler, seed: int, rank: int, world_size: int
    ) -> None:
        """Take places ``rank``, ``rank + world``, ... of each batch.

        Raises:
            ConfigError: The batch cannot be shared out evenly.
        """
        if len(sampler) % world_size:
            raise ConfigError(
                f"batch_size {len(sampler)} cannot be split over {world_size} workers"
            )
        self._recipe, self._sampler, self._seed = recipe, sampler, seed
        self._positions = range(rank, len(sampler), world_size)

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._recipe.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images uint8 (b, s, s, 3) and labels int64 (b, s, s) of a step."""
        pairs = [self._augmented_pair(step, place) for place in self._positions]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        return images, torch.from_numpy(np.stack([label for _, label in pairs])).long()

    def _augmented_pair(self, step: int, position: int) -> Pair:
        recipe, drawn = self._recipe, numpy_generator(self._seed, "augment", step, position)
        image, label = self._sampler.pair(step, position)
        scale = drawn.uniform(*recipe.scales)
        shortest = recipe.shortest_edge or min(label.shape)
        edge = max(1, round(scale * shortest))
        image, label = transforms.resize_shortest_edge(image, label, edge)
        top, left = (int(drawn.integers(0, max(side - recipe.crop, 0) + 1)) for side in label.shape)
        image, label = transforms.crop(image, label, top, left, recipe.crop)
        if recipe.jitter:
            image = transforms.jitter_colors(image, transforms.draw_jitter(drawn))
        if drawn.random() < recipe.flip:
            image, label = transforms.flip(image, label)
        return transforms.pad(image, label, recipe.crop)


def class_shares(pairs: PairSource, classes: int) -> Float[ndarray, " c"]:
    """Return which share of all labelled pixels each class has; zeros if none is labelled."""
    counts = np.zeros(256, np.int64)
    for window, sizes in enumerate(pairs.windows):
        for place in range(sum(sizes)):
            counts += np.bincount(pairs.load(window, place)[1].ravel(), minlength=256)
    return counts[:classes] / max(1, int(counts[:classes].sum()))
