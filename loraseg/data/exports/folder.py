"""Export as a dataset folder, the layout of :mod:`loraseg.data.readers.folder`."""

from pathlib import Path

from loraseg.data.exports.staging import atomic_directory, check_file_name, iter_pairs
from loraseg.data.labels import write_classes
from loraseg.data.shards.reader import ShardDataset

__all__ = ["export_folder"]


def export_folder(dataset: ShardDataset, folder: str | Path, *, split: str = "train") -> int:
    """Write ``images/<split>/<id>.png|jpg``, ``masks/<split>/<id>.png`` and ``classes.json``.

    Args:
        dataset: Of up to 255 classes.
        folder: Where to; it must not exist.
        split: Its only split.

    Returns:
        How many pairs were written.

    Raises:
        ConfigError: ``split`` is no plain name.
        DatasetError: ``folder`` exists, or there are over 255 classes.
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read or the folder not be written.
    """
    check_file_name(split, "split")
    label_space, count = dataset.classes, 0
    with atomic_directory(folder) as root:
        images, masks = root / "images" / split, root / "masks" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        write_classes(root / "classes.json", label_space)
        for pair in iter_pairs(dataset):
            (images / f"{pair.id}.{pair.suffix}").write_bytes(pair.image)
            (masks / f"{pair.id}.png").write_bytes(pair.label)
            count += 1
    return count
