"""What synthetic pairs are worth to a segmenter with few labels: filters and MatchMask++.

python -m loraseg.miniature.studies.few_shot --seeds 3 --labelled 16 64 --processes 2 --output study
python -m loraseg.miniature.studies.few_shot --data DATASET_FOLDER --output study    # real images
python -m loraseg.miniature.studies.few_shot sheet --data DATASET_FOLDER --output study    # only
draw python -m loraseg.miniature.studies.few_shot mixes --labelled 64 --output study    # shares and
steps python -m loraseg.miniature.studies.few_shot table --output study

One cell is a seed and a number of labelled images. The generator learns from these alone, draws
five images of each of their masks, a segmenter that learned from the same images votes, and
segmenters with equal training are scored on other images (methods b.5, b.6). A judge that takes no
part says how many labels are right. ``mixes`` asks what it takes: other shares of synthetic images
in a batch, longer training, a generator all of whose weights learned. Real images are shrunk to
64x80, and their generator is the miniature's: the tables show the machinery, not what Stable
Diffusion would do.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray

from loraseg.batch.pseudo_labels import FILTER_INPUTS, predict_pseudo_labels
from loraseg.data import LabelSpace
from loraseg.data.drawing import encode_png
from loraseg.data.labels import IGNORE
from loraseg.evaluate.agreement import measure_agreement
from loraseg.miniature.studies.few_shot_data import FewShotData, PairArrays, from_folder, from_world
from loraseg.miniature.studies.generator import (
    ALL_SCENES,
    SAMPLING,
    GeneratorStudyConfig,
    train_study_generator,
)
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter, decode_closed_set_segmenter
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.synth.freemask import class_mean_loss
from loraseg.synth.generator import Generator
from loraseg.synth.sheet import SheetRow, contact_sheet
from loraseg.synth.vote import FilterConfig, PseudoLabels, apply_filter
from loraseg.train.closed_set.loop import TrainingData, train_segmenter
from loraseg.train.closed_set.recipes import named_segmenter_recipe
from loraseg.train.closed_set.samples import ArrayPairs

__all__ = [
    "FewShotStudyConfig",
    "results_table",
    "run_contact_sheet",
    "run_few_shot",
    "run_mixing_ratios",
]

logger = logging.getLogger(__name__)

FILTERS = ("none", "confidence", "freemask", "relative")
_SIBLINGS = 5
_MIN_CONFIDENCE = 0.9  # below, a pseudo-mask says nothing
_SHEET_ROWS, _SHEET_MASKS = 6, 32
# Filter, synthetic share of each batch, and how many times as many steps.
_MIXES = (("freemask", 0.25, 1), ("freemask", 0.5, 1), ("relative", 0.25, 1), ("freemask", 0.25, 3))

GeneratedImages = list[tuple[ndarray, ndarray]]  # (mask, its images)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewShotStudyConfig:
    """One cell of the study.

    Attributes:
        labelled: Images with labels.
        seed: Of images, generator and segmenters.
        masks: Scenes that the generator learns from; ``labelled``, or more for an upper bound.
        steps: Updates of each segmenter.
        generator_steps: Updates of the generator.
        domain: Whose scenes.
        data: A dataset folder of real images instead.
        tuning: What of the generator learns: "lora", or all its weights.
    """

    labelled: int
    seed: int
    masks: int
    steps: int = 300
    generator_steps: int = 400
    domain: str = "clear-day"
    data: str | None = None
    tuning: Literal["lora", "full"] = "lora"

    @property
    def name(self) -> str:
        """A file name that tells the setting."""
        known = "all" if self.masks == ALL_SCENES else "own"
        source = self.domain if self.data is None else Path(self.data).name
        steps = f"t{self.steps}-g{self.generator_steps}"
        tuned = "" if self.tuning == "lora" else f"-{self.tuning}"
        return f"n{self.labelled}-{known}-{steps}-{source}{tuned}-s{self.seed}"


def run_few_shot(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    """Do all rows of a setting, or read what was found before."""
    return _run_once(config, folder, "fewshot", _score_filters)


def run_contact_sheet(config: FewShotStudyConfig, folder: Path) -> dict[str, float]:
    """Train a generator, draw for held-out masks; write a sheet, return how far they agree."""
    torch.set_num_threads(1)
    stock = _few_shot_data(config, config.labelled, folder)
    generator = _generator(config, folder)
    place = folder / "sheets" / config.name
    place.parent.mkdir(parents=True, exist_ok=True)
    drawn = _generate(generator, stock.test[1][:_SHEET_MASKS])
    _write_sheet(stock, drawn, place.with_suffix(".png"))
    found = _mask_agreement(stock, drawn)
    real = measure_agreement(stock.judge.labels, *stock.test, stock.classes)
    found["judge on real images"] = round(real.right, 4)
    place.with_suffix(".json").write_text(json.dumps(found, indent=1))
    return found


def run_mixing_ratios(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    """Train segmenters on other mixes of real and synthetic images, or read what was found."""
    return _run_once(config, folder, "mixes", _score_mixes)


def _run_once(
    setting: FewShotStudyConfig,
    folder: Path,
    kind: str,
    find: Callable[[FewShotStudyConfig, Path], dict[str, Any]],
) -> dict[str, Any]:
    place = folder / kind / f"{setting.name}.json"
    if place.is_file():
        return json.loads(place.read_text())
    torch.set_num_threads(1)
    place.parent.mkdir(parents=True, exist_ok=True)
    found = {**dataclasses.asdict(setting), **find(setting, folder)}
    place.write_text(json.dumps(found, indent=1))
    return found


def _score_mixes(setting: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    stock = _few_shot_data(setting, setting.labelled, folder)
    own = _train_segmenter(setting, stock, None)
    rows = {"real only": _score(own, stock)}
    drawn = _generate(_generator(setting, folder), stock.labelled[1])
    for method, share, times in _MIXES:
        longer = dataclasses.replace(setting, steps=times * setting.steps)
        if more := f", {times} x steps" if times > 1 else "":
            rows[f"real only{more}"] = _score(_train_segmenter(longer, stock, None), stock)
        pairs, _ = _filter_pairs(method, own, stock, drawn)
        name = f"{method}, share {share}{more}"
        rows[name] = _score(_train_segmenter(longer, stock, pairs, share=share), stock)
    return {"miou": rows, "agreement": _mask_agreement(stock, drawn)}


def _mask_agreement(stock: FewShotData, drawn: GeneratedImages) -> dict[str, float]:
    """Return the mIoU of the first images against their masks, and against wrong ones."""
    first, masks = np.stack([images[0] for _, images in drawn]), np.stack([m for m, _ in drawn])
    found = measure_agreement(stock.judge.labels, first, masks, stock.classes)
    return {"right": round(found.right, 4), "wrong": round(found.wrong, 4)}


def _few_shot_data(setting: FewShotStudyConfig, count: int, folder: Path) -> FewShotData:
    if setting.data is not None:
        return from_folder(Path(setting.data), count, setting.seed, folder / "data")
    return from_world(setting.domain, count, setting.seed, folder / "data")


def _score_filters(setting: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    stock = _few_shot_data(setting, setting.labelled, folder)
    train = partial(_train_segmenter, setting, stock)
    own = train(None)
    rows: dict[str, Any] = {"real only": _score(own, stock)}
    generator = _generator(setting, folder)
    drawn = _generate(generator, stock.labelled[1])
    _write_sheet(stock, drawn, folder / "fewshot" / f"{setting.name}.png")
    kept: dict[str, Any] = {}
    for method in FILTERS:
        pairs, kept[method] = _filter_pairs(method, own, stock, drawn)
        learned = train(pairs)
        rows[f"real + {method}"] = _score(learned, stock)
        if method == "relative":
            rows["synthetic only"] = _score(train(pairs, share=1.0), stock)
            more, kept["++"] = _pseudo_mask_round(learned, stock, generator)
            both = np.concatenate([pairs[0], more[0]]), np.concatenate([pairs[1], more[1]])
            rows["++"] = _score(train(both), stock)
    return {"miou": rows, "labels": kept, "agreement": _mask_agreement(stock, drawn)}


def _pseudo_mask_round(
    teacher: ClosedSetSegmenter, stock: FewShotData, generator: Generator
) -> tuple[PairArrays, dict[str, Any]]:
    """One round of MatchMask++: pseudo-masks of unlabelled images go through the same generator."""
    scores = teacher.log_probabilities(stock.unlabelled).max(1)
    masks = scores.indices.byte().numpy()
    masks[scores.values.exp().numpy() < _MIN_CONFIDENCE] = IGNORE
    masks = np.stack([mask for mask in masks if (mask != IGNORE).any()])
    return _filter_pairs("relative", teacher, stock, _generate(generator, masks))


def _generator(setting: FewShotStudyConfig, folder: Path) -> Generator:
    cell = GeneratorStudyConfig(
        labelled=setting.masks,
        seed=setting.seed,
        tuning=setting.tuning,
        fusion=setting.tuning == "lora",
        steps=setting.generator_steps,
        domain=setting.domain,
    )
    stock = _few_shot_data(setting, setting.masks, folder)
    base, conditioner, adapters, _ = train_study_generator(
        cell, folder, dataset=stock.folder, size=stock.labelled[1].shape[1:]
    )
    base.to("cpu", torch.bfloat16)  # thousands of images are drawn
    config = dataclasses.replace(SAMPLING, images=_SIBLINGS, batch=_SIBLINGS, precision="bf16")
    return Generator(base, conditioner, adapters=adapters, config=config)


def _generate(generator: Generator, masks: ndarray) -> GeneratedImages:
    named = [(str(index), mask) for index, mask in enumerate(masks)]
    made = [one.image for one in generator.generate(named)]
    images = np.stack(made).reshape(len(masks), _SIBLINGS, *made[0].shape)
    return list(zip(masks, images, strict=True))


def _write_sheet(stock: FewShotData, drawn: GeneratedImages, path: Path) -> None:
    """Write a sheet: mask, five images, and the labelled image that is nearest to the first."""
    flat = stock.labelled[0].reshape(len(stock.labelled[0]), -1).astype(np.float32)
    rows = []
    for index, (mask, images) in enumerate(drawn[:_SHEET_ROWS]):
        distances = np.square(flat - images[0].reshape(1, -1)).mean(1)
        nearest = stock.labelled[0][int(distances.argmin())]
        pictures = [(f"image {k}", image) for k, image in enumerate(images)]
        rows.append(SheetRow(f"mask {index}", mask, [*pictures, ("nearest real", nearest)]))
    path.write_bytes(encode_png(contact_sheet(rows, LabelSpace(stock.classes))))


def _filter_pairs(
    method: Any, segmenter: ClosedSetSegmenter, stock: FewShotData, drawn: GeneratedImages
) -> tuple[PairArrays, dict[str, Any]]:
    """Return the pairs that a filter leaves, and how many of their labels the judge finds right."""
    classes, rule = len(stock.classes), FilterConfig(method=method)
    means = None
    if method == "freemask":
        losses = (
            (mask, judged.loss[0])
            for image, mask in zip(*stock.labelled, strict=True)
            if (
                judged := predict_pseudo_labels(segmenter, image[None], mask, outputs=("loss",))
            ).loss
            is not None
        )
        means = class_mean_loss(losses, classes)
    images, labels, right = [], [], _LabelPrecision(stock.classes)
    for mask, some in drawn:
        judged: PseudoLabels = predict_pseudo_labels(
            segmenter, some, mask, outputs=FILTER_INPUTS[method]
        )
        result = apply_filter(mask, judged, rule, classes, class_loss=means)
        for image, label, dropped in zip(some, result.labels, result.dropped, strict=True):
            right.add(label, stock.judge.labels(image[None])[0], mask)
            if not dropped:
                images.append(image)
                labels.append(label)
    shape = stock.labelled[1].shape[1:]
    pairs = np.array(images, np.uint8).reshape(-1, *shape, 3), np.array(labels, np.uint8)
    return (pairs[0], pairs[1].reshape(-1, *shape)), right.to_json()


class _LabelPrecision:
    """Counts labels that were kept, and those of them that the judge confirms, by class."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._mask_pixels = np.zeros(256, np.int64)
        self._kept_pixels = np.zeros(256, np.int64)
        self._correct_pixels = np.zeros(256, np.int64)

    def add(self, label: ndarray, seen: ndarray, mask: ndarray) -> None:
        self._mask_pixels += np.bincount(mask.reshape(-1), minlength=256)
        self._kept_pixels += np.bincount(label.reshape(-1), minlength=256)
        self._correct_pixels += np.bincount(label[label == seen].reshape(-1), minlength=256)

    def to_json(self) -> dict[str, Any]:
        count = len(self._classes)
        kept, right = self._kept_pixels[:count], self._correct_pixels[:count]
        shares = np.divide(right, kept, out=np.full(count, np.nan), where=kept > 0)
        return {
            "precision": round(float(right.sum() / max(kept.sum(), 1)), 4),
            "kept": round(float(kept.sum() / self._mask_pixels[:count].sum()), 4),
            "precision_by_class": {
                name: None if np.isnan(share) else round(float(share), 3)
                for name, share in zip(self._classes, shares, strict=True)
            },
        }


def _train_segmenter(
    setting: FewShotStudyConfig,
    stock: FewShotData,
    synthetic: PairArrays | None,
    *,
    share: float = 0.5,
) -> ClosedSetSegmenter:
    recipe = named_segmenter_recipe(
        "unet-miniature",
        {"steps": setting.steps, "synthetic_share": share, "precision": "bf16"},
    )
    data = TrainingData(
        label_space=LabelSpace(stock.classes),
        real=_pairs(stock.labelled),
        synthetic=_pairs(synthetic) if synthetic is not None and len(synthetic[0]) else None,
        val=_pairs(stock.val),
    )
    made = train_segmenter(recipe, data, seed=setting.seed)
    return decode_closed_set_segmenter(made.segmenter, "study")


def _pairs(pairs: PairArrays) -> ArrayPairs:
    return ArrayPairs([*pairs[0]], [*pairs[1]])


def _score(segmenter: ClosedSetSegmenter, stock: FewShotData) -> float:
    images, masks = stock.test
    matrix = ConfusionMatrix(len(stock.classes))
    matrix.add(masks, segmenter.labels(images))
    return round(float(matrix.miou()), 4)


def results_table(folder: Path) -> str:
    """Return the tables of all settings in a folder, mean and sample deviation over seeds."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "fewshot").glob("*.json"))]
    lines: list[str] = []
    for key in sorted({_group_key(row) for row in results}):
        some = [row for row in results if _group_key(row) == key]
        lines += [
            f"{key[0]}, {key[1]} labelled, generator from {key[2]} masks in {key[4]} steps, "
            f"segmenters in {key[3]}, {len(some)} seeds",
            "| training | mIoU | label precision | labels kept |",
            "|---|---|---|---|",
        ]
        for name in some[0]["miou"]:
            labels = [row["labels"].get(name.removeprefix("real + "), {}) for row in some]
            cells = [
                _mean_and_deviation([row["miou"][name] for row in some]),
                _mean_and_deviation([one["precision"] for one in labels if one]),
                _mean_and_deviation([one["kept"] for one in labels if one]),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = {"run": run_few_shot, "sheet": run_contact_sheet, "mixes": run_mixing_ratios}
    parser.add_argument("command", nargs="?", choices=[*jobs, "table"], default="run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labelled", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--all-masks", action="store_true", help="generators from 2,048 scenes too")
    parser.add_argument("--data", help="a dataset folder of real images instead of the miniature")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--generator-steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("study"), help="where results lie")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if arguments.command != "table":
        tunings = ("lora", "full") if arguments.command == "mixes" else ("lora",)
        work = [
            FewShotStudyConfig(
                labelled=labelled,
                seed=seed,
                masks=masks,
                steps=arguments.steps,
                generator_steps=arguments.generator_steps,
                data=arguments.data,
                tuning=tuning,
            )
            for tuning in tunings
            for seed in range(arguments.seeds)
            for labelled in arguments.labelled
            for masks in ((labelled, ALL_SCENES) if arguments.all_masks else (labelled,))
        ]
        job = partial(jobs[arguments.command], folder=arguments.output)
        context = get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
            for setting, done in zip(work, pool.map(job, work), strict=True):
                logger.info("%s: %s", setting.name, json.dumps(done.get("miou", done)))
    if arguments.command in ("run", "table"):
        sys.stdout.write(results_table(arguments.output))


def _group_key(row: dict[str, Any]) -> tuple[str, int, int, int, int]:
    source = row["domain"] if row["data"] is None else Path(row["data"]).name
    return source, row["labelled"], row["masks"], row["steps"], row["generator_steps"]


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * float(np.mean(values)):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


if __name__ == "__main__":
    main()
