"""The data of a closed-set training, and the digests of its bytes."""

import hashlib
from dataclasses import dataclass

from loraseg.data import Dataset, Sample, digest_samples, open_dataset
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError
from loraseg.train.closed_set.loop import TrainingData
from loraseg.train.closed_set.samples import FolderPairs, ShardPairs

__all__ = ["DataSpec", "TrainingDataDigests", "select_samples"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingDataDigests:
    """Digests (hex) of all data of a training.

    Attributes:
        real: Digest of the real training samples.
        val: Digest of the validation samples.
        synthetic: Digest of each synthetic dataset's manifest, which contains those of its shards.
    """

    real: str
    val: str
    synthetic: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Locations of the data; attributes as in SegmenterTrainingConfig."""

    real: str
    split: str
    val_split: str
    images: int | tuple[str, ...] | None
    synthetic: tuple[str, ...]

    def open(self) -> tuple[TrainingData, TrainingDataDigests]:
        """Open the data and digest all real samples.

        Raises:
            ConfigError: ``images`` does not fit the split.
            DatasetError: The data cannot be used.
            IntegrityError: A manifest is damaged.
            StoreError: A store cannot be read.
        """
        dataset = open_dataset(self.real)
        synthetic = [ShardDataset.open(place) for place in self.synthetic]
        space = dataset.label_space
        real = select_samples(dataset, self.split, self.images)
        val = dataset.samples(self.val_split)
        data = TrainingData(
            label_space=space,
            real=FolderPairs(dataset, real),
            synthetic=ShardPairs(synthetic, space) if synthetic else None,
            val=FolderPairs(dataset, val),
        )
        manifests = (shards.manifest.to_bytes() for shards in synthetic)
        return data, TrainingDataDigests(
            real=digest_samples(dataset, real),
            val=digest_samples(dataset, val),
            synthetic=tuple(hashlib.sha256(manifest).hexdigest() for manifest in manifests),
        )

    def changed_sources(self, before: TrainingDataDigests, now: TrainingDataDigests) -> list[str]:
        """Return the URIs of the sources whose digests differ."""
        pairs = zip(self.synthetic, before.synthetic, now.synthetic, strict=True)
        changed = [uri for uri, old, new in pairs if old != new]
        if (before.real, before.val) != (now.real, now.val):
            changed.insert(0, self.real)
        return changed


def select_samples(
    dataset: Dataset, split: str, images: int | tuple[str, ...] | None
) -> tuple[Sample, ...]:
    """Return the samples of a split to train on.

    Args:
        dataset: The dataset.
        split: Name of the split.
        images: Number of samples, the first by name; or names of samples; None for all.

    Raises:
        ConfigError: The split has fewer samples, or none of a name.
        DatasetError: The split cannot be read.
    """
    samples = dataset.samples(split)
    if images is None:
        return samples
    if isinstance(images, int):
        if not 1 <= images <= len(samples):
            raise ConfigError(f"images: got {images}, split {split!r} has {len(samples)}")
        return samples[:images]
    by_id = {sample.id: sample for sample in samples}
    if absent := [name for name in images if name not in by_id]:
        raise ConfigError(f"images: no {absent[0]!r} in split {split!r} of {dataset.location}")
    return tuple(by_id[name] for name in sorted(set(images)))
