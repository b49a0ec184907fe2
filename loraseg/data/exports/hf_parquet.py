"""Parquet as the Hugging Face ``datasets`` library and viewer show it, with pictures decoded."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.exports.staging import ExportPair, atomic_directory, check_file_name, iter_pairs
from loraseg.data.shards.reader import ShardDataset

__all__ = ["export_hf_parquet"]

# The viewer reads whole row groups; its makers advise about a hundred pictures in one.
_GROUP_ROWS = 100
_FILE_ROWS = 2000
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS = {
    "pair_id": pa.string(),
    "mask_name": pa.string(),
    "mask_id": pa.string(),
    "k": pa.int32(),
    "seed": pa.int64(),
    "prompt": pa.string(),
    "kept": pa.float64(),
}
_FEATURES: dict[str, dict[str, Any]] = {
    "image": {"_type": "Image"},
    "label": {"_type": "Image"},
    **{
        name: {"dtype": "float64" if kind == pa.float64() else str(kind), "_type": "Value"}
        for name, kind in _COLUMNS.items()
    },
}
_SCHEMA = pa.schema(
    [("image", _IMAGE_TYPE), ("label", _IMAGE_TYPE), *_COLUMNS.items()],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def export_hf_parquet(dataset: ShardDataset, folder: str | Path, *, split: str = "train") -> int:
    """Write ``data/<split>-00000-of-0000n.parquet`` and so on, and ``classes.json``.

    ``datasets.load_dataset(folder)`` gives ``image`` and ``label`` as pictures; the pixels of a
    label are class ids, 255 (with over 255 classes 65535) for none.

    Args:
        dataset: What to write.
        folder: Where to; it must not exist.
        split: Prefix of the file names.

    Returns:
        How many pairs were written.

    Raises:
        ConfigError: ``split`` is no plain name.
        DatasetError: ``folder`` exists.
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read or the folder not be written.
    """
    check_file_name(split, "split")
    files = max(1, -(-len(dataset) // _FILE_ROWS))
    count = 0
    with atomic_directory(folder) as root:
        (root / "data").mkdir()
        names = json.dumps(list(dataset.manifest.classes), ensure_ascii=False, indent=1)
        (root / "classes.json").write_text(f"{names}\n", encoding="utf-8")
        stream = iter_pairs(dataset)
        for number in range(files):
            path = root / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"
            count += _write_file(path, itertools.islice(stream, _FILE_ROWS))
    return count


def _write_file(path: Path, file_pairs: Iterator[ExportPair]) -> int:
    count = 0
    with pq.ParquetWriter(path, _SCHEMA, compression="none") as writer:
        while group := [_to_row(pair) for pair in itertools.islice(file_pairs, _GROUP_ROWS)]:
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            count += len(group)
    return count


def _to_row(pair: ExportPair) -> dict[str, Any]:
    return {
        "image": {"bytes": pair.image, "path": f"{pair.id}.{pair.suffix}"},
        "label": {"bytes": pair.label, "path": f"{pair.id}_label.png"},
        "pair_id": pair.id,
        **pair.metadata,
    }
