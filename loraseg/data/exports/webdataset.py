"""Tar files as the ``webdataset`` library and its likes stream them."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np

from loraseg.data.exports.staging import ExportPair, atomic_directory, check_file_name, iter_pairs
from loraseg.data.masks import encode_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError

__all__ = ["export_webdataset"]


def export_webdataset(
    dataset: ShardDataset, folder: str | Path, *, split: str = "train", pairs_per_tar: int = 1000
) -> int:
    """Write ``<split>-000000.tar`` and so on, and ``classes.json`` with the names.

    A sample's key is its pair id; its parts are ``png`` or ``jpg`` (the image), ``seg.png`` (class
    ids, 255 or with over 255 classes 65535 for none; grey, since decoders turn a palette into
    colours) and ``json``. Equal data give equal bytes.

    Args:
        dataset: What to write.
        folder: Where to; it must not exist.
        split: Prefix of the file names.
        pairs_per_tar: Maximum number of pairs per file.

    Returns:
        How many pairs were written.

    Raises:
        ConfigError: ``split`` is no plain name, or ``pairs_per_tar`` is below 1.
        DatasetError: ``folder`` exists.
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read or the folder not be written.
    """
    check_file_name(split, "split")
    if pairs_per_tar < 1:
        raise ConfigError(f"pairs_per_tar: got {pairs_per_tar}, expected at least 1")
    count = 0
    with atomic_directory(folder) as root:
        names = json.dumps(list(dataset.manifest.classes), ensure_ascii=False, indent=1)
        (root / "classes.json").write_text(f"{names}\n", encoding="utf-8")
        stream = iter_pairs(dataset)
        for number, first in enumerate(stream):
            some = itertools.chain([first], itertools.islice(stream, pairs_per_tar - 1))
            with tarfile.open(root / f"{split}-{number:06d}.tar", "w") as tar:
                for pair in some:
                    _add_sample(tar, pair)
                    count += 1
    return count


def _add_sample(tar: tarfile.TarFile, pair: ExportPair) -> None:
    facts = json.dumps(pair.metadata, sort_keys=True, ensure_ascii=False).encode()
    label = encode_mask(pair.label_ids) if pair.label_ids.dtype == np.uint8 else pair.label
    parts = {pair.suffix: pair.image, "seg.png": label, "json": facts}
    for extension, data in parts.items():
        member = tarfile.TarInfo(f"{pair.id}.{extension}")  # of no owner and no time
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
