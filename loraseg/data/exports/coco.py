"""COCO: one JSON file with a run-length mask for every class in every image."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraseg.data.exports.staging import ExportPair, atomic_directory, iter_pairs
from loraseg.data.mask_encodings.rle import encode_rle
from loraseg.data.shards.pictures import ignore_id
from loraseg.data.shards.reader import ShardDataset
from loraseg.tensor_types import ndarray

__all__ = ["export_coco"]


def export_coco(dataset: ShardDataset, folder: str | Path) -> int:
    """Write ``images/<pair id>.png|jpg`` and ``annotations.json``.

    Every class of an image is one annotation, as in COCO-Stuff; pixels without a class belong to
    none. The category of class id i is i + 1, since COCO counts from one and many programs take 0
    for the background. Images are numbered from one.

    Args:
        dataset: What to write.
        folder: Where to; it must not exist.

    Returns:
        How many pairs were written.

    Raises:
        DatasetError: ``folder`` exists.
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read or the folder not be written.
    """
    categories = [
        {"id": index + 1, "name": name, "supercategory": "stuff"}
        for index, name in enumerate(dataset.manifest.classes)
    ]
    count = number = 0
    with atomic_directory(folder) as root:
        (root / "images").mkdir()
        listing = root / "images.part"
        with (
            (root / "annotations.json").open("w", encoding="utf-8") as file,
            listing.open("w+", encoding="utf-8") as images,
        ):
            # Annotations go straight to their place and the list of images waits in a file, so
            # that memory does not grow with the number of pairs.
            file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
            for count, pair in enumerate(iter_pairs(dataset), 1):
                name = f"images/{pair.id}.{pair.suffix}"
                (root / name).write_bytes(pair.image)
                images.write(_json_item(_image_entry(pair, count, name), count))
                for annotation in _annotations(pair, count, len(categories)):
                    number += 1
                    file.write(_json_item({"id": number, **annotation}, number))
            file.write('],\n"images": [')
            images.seek(0)
            shutil.copyfileobj(images, file)
            file.write("]}\n")
        listing.unlink()
    return count


def _json_item(content: Mapping[str, Any], number: int) -> str:
    return f"{',' if number > 1 else ''}\n{json.dumps(content)}"


def _image_entry(pair: ExportPair, number: int, name: str) -> dict[str, Any]:
    height, width = pair.label_ids.shape
    return {"id": number, "file_name": name, "height": height, "width": width}


def _annotations(pair: ExportPair, image: int, classes: int) -> Iterator[dict[str, Any]]:
    present = np.unique(pair.label_ids)
    for rle in encode_rle(pair.label_ids, present[present != ignore_id(classes)].tolist()):
        yield {
            "image_id": image,
            "category_id": rle["class_id"] + 1,
            "segmentation": {"size": rle["size"], "counts": rle["counts"]},
            "area": rle["area"],
            "bbox": _bounding_box(pair.label_ids == rle["class_id"]),
            "iscrowd": 0,
        }


def _bounding_box(inside: ndarray) -> list[int]:
    """Return x, y, width and height of what is true."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
