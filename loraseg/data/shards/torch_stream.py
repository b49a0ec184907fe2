"""Synthetic pairs as a stream for torch's DataLoader."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch.utils.data

from loraseg.data.shards.pictures import decode_pair
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow
from loraseg.errors import ConfigError
from loraseg.seeding import numpy_generator

__all__ = ["ShardStream"]

_COLUMNS = ("image", "label", "height", "width")
ItemT = TypeVar("ItemT")


class ShardStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """All ``ok`` pairs once per epoch, divided among ranks and their DataLoader workers.

    The shards are put in an order drawn for the epoch. Each consumer takes an equal stretch of the
    pairs in that order, so that it reads few shards that others read too and no count differs by
    more than one, and draws from a buffer. Items are ``image`` uint8 (h, w, 3) RGB, ``label``
    uint8 (h, w) with 255 for no class (uint16 and 65535 with over 255 classes) and ``pair_id``.
    What is drawn depends on the seed, the epoch, and the number of ranks and workers.
    """

    def __init__(
        self,
        dataset: ShardDataset | str,
        *,
        seed: int = 0,
        buffer_size: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Stream a dataset.

        Args:
            dataset: The dataset, or its store URI.
            seed: The user's seed.
            buffer_size: How many pairs to draw from, as files in memory; 1 keeps the order of each
                shard.
            rank: Of this process among those that share the dataset, from 0.
            world_size: How many share it.

        Raises:
            ConfigError: ``buffer_size`` is below 1 or ``rank`` is not below ``world_size``.
            DatasetError: Nothing is committed at the URI.
        """
        super().__init__()
        if buffer_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"shard stream: buffer {buffer_size}, rank {rank} of {world_size}")
        self._dataset = ShardDataset.open(dataset) if isinstance(dataset, str) else dataset
        self._seed = seed
        self._buffer_size = buffer_size
        self._rank, self._world_size = rank, world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; persistent workers keep the old one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this consumer's pairs.

        Raises:
            IntegrityError: A shard or a picture in it is damaged.
            StoreError: The store cannot be read.
        """
        dataset, workers, worker = self._dataset, 1, 0
        if (info := torch.utils.data.get_worker_info()) is not None:
            workers, worker = info.num_workers, info.id
        consumer, consumers = self._rank * workers + worker, self._world_size * workers
        total = len(dataset)
        start, stop = total * consumer // consumers, total * (consumer + 1) // consumers
        generator = numpy_generator(self._seed, "shard-rows", self._epoch, consumer, consumers)
        classes = len(dataset.manifest.classes)
        for row in _shuffle_buffer(
            self._pairs_in_range(dataset, start, stop), self._buffer_size, generator
        ):
            image, label = decode_pair(row, classes, dataset.store.uri)
            yield {"image": image, "label": label, "pair_id": row.pair_id}

    def _pairs_in_range(self, dataset: ShardDataset, start: int, stop: int) -> Iterator[PairRow]:
        """Yield the pairs from place ``start`` to ``stop`` of the epoch's order of shards."""
        shards = dataset.manifest.shards
        first = 0  # place of the shard's first pair
        for index in numpy_generator(self._seed, "shards", self._epoch).permutation(len(shards)):
            end = first + shards[index].statuses["ok"]
            if start < end and first < stop:
                rows = dataset.read_shard(shards[index], columns=_COLUMNS)
                pairs = (row for row in rows if row.status == "ok")
                yield from (row for at, row in enumerate(pairs, first) if start <= at < stop)
            first = end


def _shuffle_buffer(items: Iterator[ItemT], size: int, generator: Any) -> Iterator[ItemT]:
    buffer: list[ItemT] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in generator.permutation(len(buffer)):
        yield buffer[place]
