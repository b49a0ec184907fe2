"""Data of the few-shot study, from the miniature world or from a dataset folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from loraseg.data import (
    Dataset,
    LabelSpace,
    load_pair,
    open_dataset,
    write_classes,
    write_mask,
)
from loraseg.errors import DatasetError
from loraseg.miniature.models.weights_io import WEIGHTS
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.render import render
from loraseg.seeding import numpy_generator
from loraseg.segment.closed_set.checkpoint import (
    ClosedSetSegmenter,
    decode_closed_set_segmenter,
    load_closed_set_segmenter,
)
from loraseg.train.closed_set.loop import TrainingData, train_segmenter
from loraseg.train.closed_set.recipes import named_segmenter_recipe
from loraseg.train.closed_set.samples import ArrayPairs

__all__ = ["FewShotData", "from_folder", "from_world"]

PairArrays = tuple[ndarray, ndarray]

# Height and width to which real images are resized, a size that the miniature generator supports.
REAL_SIZE = (64, 80)
_VAL, _TEST, _UNLABELLED = 64, 300, 64
_JUDGE_STEPS = 900


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewShotData:
    """Data of a few-shot experiment; pairs are images (n, h, w, 3) and label maps (n, h, w).

    Attributes:
        classes: Class names by id.
        labelled: The few labelled images.
        val: Pairs that select the checkpoint of a segmenter.
        test: Pairs that determine the score.
        unlabelled: Images (n, h, w, 3) for pseudo-masks.
        judge: Segmenter trained on many more labels; used for measurements only.
        folder: The labelled images as a dataset folder.
    """

    classes: tuple[str, ...]
    labelled: PairArrays
    val: PairArrays
    test: PairArrays
    unlabelled: ndarray
    judge: ClosedSetSegmenter
    folder: Path


def from_world(domain: str, count: int, seed: int, folder: Path) -> FewShotData:
    """Return scenes of the miniature world with the shipped judge."""
    data_seed = 1000 + seed
    labelled = render(domain, count, data_seed, "train")
    dataset_folder = _write_folder(folder / f"{domain}-{seed}-{count}", labelled, CLASSES)
    return FewShotData(
        classes=tuple(CLASSES),
        labelled=labelled,
        val=render(domain, _VAL, data_seed, "fewshot-val"),
        test=render(domain, _TEST, 0, "fewshot-test"),
        unlabelled=render(domain, _UNLABELLED, data_seed, "fewshot-unlabelled")[0],
        judge=load_closed_set_segmenter(WEIGHTS / "judge.safetensors"),
        folder=dataset_folder,
    )


def from_folder(source: Path, count: int, seed: int, folder: Path) -> FewShotData:
    """Return resized images of a dataset folder, with a judge trained on its whole split "train".

    The labelled images are drawn from "train". Half of the others, at most 64, select checkpoints;
    the rest is unlabelled. The split "val" is the test.

    Raises:
        DatasetError: The split "train" has too few images.
    """
    dataset = open_dataset(source)
    train, test = _load_shrunk(dataset, "train"), _load_shrunk(dataset, "val")
    order = numpy_generator(seed, "fewshot", "folder").permutation(len(train[0]))
    if len(order) < count + 4:
        raise DatasetError(f"{source}: {len(order)} images, expected over {count + 3}")
    chosen, rest = order[:count], order[count:]
    count_val = min(_VAL, len(rest) // 2)
    val, unlabelled = rest[:count_val], rest[count_val:][:_UNLABELLED]
    names = dataset.label_space.names
    labelled = train[0][chosen], train[1][chosen]
    return FewShotData(
        classes=names,
        labelled=labelled,
        val=(train[0][val], train[1][val]),
        test=test,
        unlabelled=train[0][unlabelled],
        judge=_judge(names, train, folder / f"{source.name}-judge.safetensors"),
        folder=_write_folder(folder / f"{source.name}-{seed}-{count}", labelled, names),
    )


def _load_shrunk(dataset: Dataset, split: str) -> PairArrays:
    height, width = REAL_SIZE
    images, masks = [], []
    for sample in dataset.samples(split):
        image, mask = load_pair(dataset, sample)
        images.append(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
        masks.append(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return np.stack([np.asarray(i) for i in images]), np.stack([np.asarray(m) for m in masks])


def _judge(names: Sequence[str], train: PairArrays, path: Path) -> ClosedSetSegmenter:
    """Return the judge from its file; train it on all pairs if the file does not exist."""
    if not path.is_file():
        recipe = named_segmenter_recipe(
            "unet-miniature", {"steps": _JUDGE_STEPS, "precision": "bf16", "eval_every": 300}
        )
        pairs = ArrayPairs([*train[0]], [*train[1]])
        data = TrainingData(
            label_space=LabelSpace(tuple(names)), real=pairs, synthetic=None, val=pairs
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train_segmenter(recipe, data).segmenter)
    return decode_closed_set_segmenter(path.read_bytes(), str(path))


def _write_folder(folder: Path, pairs: PairArrays, names: Sequence[str]) -> Path:
    """Write pairs as the split "train" of a dataset folder, unless it exists."""
    space = LabelSpace(tuple(names))
    if (folder / "classes.json").is_file():
        return folder
    for kind in ("images", "masks"):
        (folder / kind / "train").mkdir(parents=True, exist_ok=True)
    for number, (image, mask) in enumerate(zip(*pairs, strict=True)):
        Image.fromarray(image).save(folder / "images" / "train" / f"{number:04d}.png")
        write_mask(folder / "masks" / "train" / f"{number:04d}.png", mask, space)
    write_classes(folder / "classes.json", space)
    return folder
