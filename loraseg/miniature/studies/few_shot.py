"""Study of the value of synthetic pairs for a segmenter with few labels.

python -m loraseg.miniature.studies.few_shot --seeds 3 --labelled 16 64 --processes 2 --output study
python -m loraseg.miniature.studies.few_shot --data DATASET_FOLDER --output study    # real images
python -m loraseg.miniature.studies.few_shot sheet --data DATASET_FOLDER --output study
python -m loraseg.miniature.studies.few_shot mixes --labelled 64 --output study
python -m loraseg.miniature.studies.few_shot table --output study

A configuration has a seed and a number of labelled images. The generator is trained on these
images, and five images of each of their masks are generated. A segmenter trained on the same images
votes on the labels (MatchMask's relative filtering), and segmenters with equal training are scored
on other images. A judge that takes no part in the training measures the share of correct labels.

``sheet`` trains the generator only and writes a contact sheet. ``mixes`` trains on other shares of
synthetic images, for more steps, and with a fully tuned generator. Real images are resized to
64x80, and their generator is the miniature: the tables show the machinery, not the quality of
Stable Diffusion.
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
from loraseg.miniature.studies.measures import LabelPrecision, mean_and_deviation
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
_MIN_CONFIDENCE = 0.9  # pixels of pseudo-masks with less confidence are ignored
_SHEET_ROWS, _SHEET_MASKS = 6, 32
# Filter, synthetic share of each batch, and factor on the number of steps.
_MIXES = (("freemask", 0.25, 1), ("freemask", 0.5, 1), ("relative", 0.25, 1), ("freemask", 0.25, 3))

GeneratedImages = list[tuple[ndarray, ndarray]]  # (mask, its images)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewShotStudyConfig:
    """A configuration of the study.

    Attributes:
        labelled: Number of labelled images.
        seed: Seed of images, generator and segmenters.
        masks: Number of scenes for the generator: ``labelled``, or more for an upper bound.
        steps: Training steps of each segmenter.
        generator_steps: Training steps of the generator.
        domain: Domain of the scenes.
        data: A dataset folder of real images, used instead of scenes.
        tuning: "lora", or "full" to train all weights of the generator.
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
        """File name of the results."""
        masks = "all" if self.masks == ALL_SCENES else "own"
        source = self.domain if self.data is None else Path(self.data).name
        steps = f"t{self.steps}-g{self.generator_steps}"
        tuned = "" if self.tuning == "lora" else f"-{self.tuning}"
        return f"n{self.labelled}-{masks}-{steps}-{source}{tuned}-s{self.seed}"


def run_few_shot(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    """Score all filters of a configuration, or read the stored results."""
    return _run_once(config, folder, "fewshot", _score_filters)


def run_contact_sheet(config: FewShotStudyConfig, folder: Path) -> dict[str, float]:
    """Train a generator, write a contact sheet and return the agreement of images and masks."""
    torch.set_num_threads(1)
    data = _few_shot_data(config, config.labelled, folder)
    generator = _generator(config, folder)
    path = folder / "sheets" / config.name
    path.parent.mkdir(parents=True, exist_ok=True)
    generated = _generate(generator, data.test[1][:_SHEET_MASKS])
    _write_sheet(data, generated, path.with_suffix(".png"))
    agreement = _mask_agreement(data, generated)
    real = measure_agreement(data.judge.labels, *data.test, data.classes)
    agreement["judge on real images"] = round(real.right, 4)
    path.with_suffix(".json").write_text(json.dumps(agreement, indent=1))
    return agreement


def run_mixing_ratios(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    """Train segmenters on other shares of synthetic images, or read the stored results."""
    return _run_once(config, folder, "mixes", _score_mixes)


def _run_once(
    config: FewShotStudyConfig,
    folder: Path,
    kind: str,
    compute: Callable[[FewShotStudyConfig, Path], dict[str, Any]],
) -> dict[str, Any]:
    path = folder / kind / f"{config.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**dataclasses.asdict(config), **compute(config, folder)}
    path.write_text(json.dumps(results, indent=1))
    return results


def _score_mixes(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    data = _few_shot_data(config, config.labelled, folder)
    voter = _train_segmenter(config, data, None)
    rows = {"real only": _score(voter, data)}
    generated = _generate(_generator(config, folder), data.labelled[1])
    for method, share, times in _MIXES:
        longer = dataclasses.replace(config, steps=times * config.steps)
        if more := f", {times} x steps" if times > 1 else "":
            rows[f"real only{more}"] = _score(_train_segmenter(longer, data, None), data)
        pairs, _ = _filter_pairs(method, voter, data, generated)
        name = f"{method}, share {share}{more}"
        rows[name] = _score(_train_segmenter(longer, data, pairs, share=share), data)
    return {"miou": rows, "agreement": _mask_agreement(data, generated)}


def _mask_agreement(data: FewShotData, generated: GeneratedImages) -> dict[str, float]:
    """Return the agreement of the first image of each mask with its mask and with a wrong one."""
    first, masks = (
        np.stack([images[0] for _, images in generated]),
        np.stack([m for m, _ in generated]),
    )
    agreement = measure_agreement(data.judge.labels, first, masks, data.classes)
    return {"right": round(agreement.right, 4), "wrong": round(agreement.wrong, 4)}


def _few_shot_data(config: FewShotStudyConfig, count: int, folder: Path) -> FewShotData:
    if config.data is not None:
        return from_folder(Path(config.data), count, config.seed, folder / "data")
    return from_world(config.domain, count, config.seed, folder / "data")


def _score_filters(config: FewShotStudyConfig, folder: Path) -> dict[str, Any]:
    data = _few_shot_data(config, config.labelled, folder)
    train = partial(_train_segmenter, config, data)
    voter = train(None)
    rows: dict[str, Any] = {"real only": _score(voter, data)}
    generator = _generator(config, folder)
    generated = _generate(generator, data.labelled[1])
    _write_sheet(data, generated, folder / "fewshot" / f"{config.name}.png")
    kept: dict[str, Any] = {}
    for method in FILTERS:
        pairs, kept[method] = _filter_pairs(method, voter, data, generated)
        segmenter = train(pairs)
        rows[f"real + {method}"] = _score(segmenter, data)
        if method == "relative":
            rows["synthetic only"] = _score(train(pairs, share=1.0), data)
            more, kept["++"] = _pseudo_mask_round(segmenter, data, generator)
            both = np.concatenate([pairs[0], more[0]]), np.concatenate([pairs[1], more[1]])
            rows["++"] = _score(train(both), data)
    return {"miou": rows, "labels": kept, "agreement": _mask_agreement(data, generated)}


def _pseudo_mask_round(
    teacher: ClosedSetSegmenter, data: FewShotData, generator: Generator
) -> tuple[PairArrays, dict[str, Any]]:
    """Run a round of MatchMask++: generate images of pseudo-masks of the unlabelled images."""
    scores = teacher.log_probabilities(data.unlabelled).max(1)
    masks = scores.indices.byte().numpy()
    masks[scores.values.exp().numpy() < _MIN_CONFIDENCE] = IGNORE
    masks = np.stack([mask for mask in masks if (mask != IGNORE).any()])
    return _filter_pairs("relative", teacher, data, _generate(generator, masks))


def _generator(config: FewShotStudyConfig, folder: Path) -> Generator:
    generator_config = GeneratorStudyConfig(
        labelled=config.masks,
        seed=config.seed,
        tuning=config.tuning,
        fusion=config.tuning == "lora",
        steps=config.generator_steps,
        domain=config.domain,
    )
    data = _few_shot_data(config, config.masks, folder)
    base, conditioner, adapters, _ = train_study_generator(
        generator_config, folder, dataset=data.folder, size=data.labelled[1].shape[1:]
    )
    base.to("cpu", torch.bfloat16)  # thousands of images are generated
    sampling = dataclasses.replace(SAMPLING, images=_SIBLINGS, batch=_SIBLINGS, precision="bf16")
    return Generator(base, conditioner, adapters=adapters, config=sampling)


def _generate(generator: Generator, masks: ndarray) -> GeneratedImages:
    named = [(str(index), mask) for index, mask in enumerate(masks)]
    generated = [sample.image for sample in generator.generate(named)]
    images = np.stack(generated).reshape(len(masks), _SIBLINGS, *generated[0].shape)
    return list(zip(masks, images, strict=True))


def _write_sheet(data: FewShotData, generated: GeneratedImages, path: Path) -> None:
    """Write a sheet with each mask, its images and the labelled image nearest to the first."""
    flat = data.labelled[0].reshape(len(data.labelled[0]), -1).astype(np.float32)
    rows = []
    for index, (mask, images) in enumerate(generated[:_SHEET_ROWS]):
        distances = np.square(flat - images[0].reshape(1, -1)).mean(1)
        nearest = data.labelled[0][int(distances.argmin())]
        pictures = [(f"image {k}", image) for k, image in enumerate(images)]
        rows.append(SheetRow(f"mask {index}", mask, [*pictures, ("nearest real", nearest)]))
    path.write_bytes(encode_png(contact_sheet(rows, LabelSpace(data.classes))))


def _filter_pairs(
    method: Any, segmenter: ClosedSetSegmenter, data: FewShotData, generated: GeneratedImages
) -> tuple[PairArrays, dict[str, Any]]:
    """Return the pairs that a filter keeps, and the precision of their labels."""
    classes, rule = len(data.classes), FilterConfig(method=method)
    means = None
    if method == "freemask":
        losses = (
            (mask, judged.loss[0])
            for image, mask in zip(*data.labelled, strict=True)
            if (
                judged := predict_pseudo_labels(segmenter, image[None], mask, outputs=("loss",))
            ).loss
            is not None
        )
        means = class_mean_loss(losses, classes)
    images, labels, precision = [], [], LabelPrecision(data.classes)
    for mask, siblings in generated:
        judged: PseudoLabels = predict_pseudo_labels(
            segmenter, siblings, mask, outputs=FILTER_INPUTS[method]
        )
        result = apply_filter(mask, judged, rule, classes, class_loss=means)
        for image, label, dropped in zip(siblings, result.labels, result.dropped, strict=True):
            precision.add(label, data.judge.labels(image[None])[0], mask)
            if not dropped:
                images.append(image)
                labels.append(label)
    shape = data.labelled[1].shape[1:]
    pairs = np.array(images, np.uint8).reshape(-1, *shape, 3), np.array(labels, np.uint8)
    return (pairs[0], pairs[1].reshape(-1, *shape)), precision.to_json()


def _train_segmenter(
    config: FewShotStudyConfig,
    data: FewShotData,
    synthetic: PairArrays | None,
    *,
    share: float = 0.5,
) -> ClosedSetSegmenter:
    recipe = named_segmenter_recipe(
        "unet-miniature",
        {"steps": config.steps, "synthetic_share": share, "precision": "bf16"},
    )
    training_data = TrainingData(
        label_space=LabelSpace(data.classes),
        real=_pairs(data.labelled),
        synthetic=_pairs(synthetic) if synthetic is not None and len(synthetic[0]) else None,
        val=_pairs(data.val),
    )
    result = train_segmenter(recipe, training_data, seed=config.seed)
    return decode_closed_set_segmenter(result.segmenter, "study")


def _pairs(pairs: PairArrays) -> ArrayPairs:
    return ArrayPairs([*pairs[0]], [*pairs[1]])


def _score(segmenter: ClosedSetSegmenter, data: FewShotData) -> float:
    images, masks = data.test
    matrix = ConfusionMatrix(len(data.classes))
    matrix.add(masks, segmenter.labels(images))
    return round(float(matrix.miou()), 4)


def results_table(folder: Path) -> str:
    """Return Markdown tables of all configurations: mean and sample deviation over seeds."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "fewshot").glob("*.json"))]
    lines: list[str] = []
    for key in sorted({_group_key(row) for row in results}):
        runs = [row for row in results if _group_key(row) == key]
        lines += [
            f"{key[0]}, {key[1]} labelled, generator from {key[2]} masks in {key[4]} steps, "
            f"segmenters in {key[3]}, {len(runs)} seeds",
            "| training | mIoU | label precision | labels kept |",
            "|---|---|---|---|",
        ]
        for name in runs[0]["miou"]:
            labels = [row["labels"].get(name.removeprefix("real + "), {}) for row in runs]
            cells = [
                mean_and_deviation([row["miou"][name] for row in runs]),
                mean_and_deviation([label["precision"] for label in labels if label]),
                mean_and_deviation([label["kept"] for label in labels if label]),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = {"run": run_few_shot, "sheet": run_contact_sheet, "mixes": run_mixing_ratios}
    parser.add_argument("command", nargs="?", choices=[*jobs, "table"], default="run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labelled", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--all-masks", action="store_true", help="also train generators on 2,048 scenes"
    )
    parser.add_argument("--data", help="dataset folder of real images, used instead of scenes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--generator-steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("study"), help="folder of the results")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if arguments.command != "table":
        tunings = ("lora", "full") if arguments.command == "mixes" else ("lora",)
        configs = [
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
            for config, results in zip(configs, pool.map(job, configs), strict=True):
                logger.info("%s: %s", config.name, json.dumps(results.get("miou", results)))
    if arguments.command in ("run", "table"):
        sys.stdout.write(results_table(arguments.output))


def _group_key(row: dict[str, Any]) -> tuple[str, int, int, int, int]:
    source = row["domain"] if row["data"] is None else Path(row["data"]).name
    return source, row["labelled"], row["masks"], row["steps"], row["generator_steps"]


if __name__ == "__main__":
    main()
