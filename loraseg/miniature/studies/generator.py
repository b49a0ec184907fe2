"""How well generators follow masks: by labels, seeds, tuned layers, rank and fusion.

python -m loraseg.miniature.studies.generator --seeds 3 --processes 2 --output study
python -m loraseg.miniature.studies.generator table study      # the table of what is there

Each cell trains a generator on some labelled scenes, draws images for held-out masks and lets the
judge look for the masks in them. Results are kept one file a cell; run again, it goes on.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.adapters.targets.selection import bottom_k, select_from_report
from loraseg.adapters.targets.unet import attention_projections
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.data import LabelSpace, open_dataset, write_classes
from loraseg.evaluate.agreement import measure_agreement
from loraseg.miniature.models.weights_io import WEIGHTS
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.dataset import write_dataset
from loraseg.miniature.world.domains import DOMAINS
from loraseg.miniature.world.render import render
from loraseg.probes.gradient import GradientProbeConfig, gradient_probe
from loraseg.seeding import numpy_generator
from loraseg.segment.closed_set.unet import load_unet, predict_labels
from loraseg.storage import open_store
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.generator import Generator
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.sampling import SamplingConfig
from loraseg.train.generator_adapters.crops import CroppedImages
from loraseg.train.generator_adapters.latents import TensorCache
from loraseg.train.generator_adapters.recipes import (
    AttentionMixConfig,
    GeneratorRecipe,
    matchmask_miniature,
)
from loraseg.train.generator_adapters.samples import CropConditions, DenoisingData, DrawConfig
from loraseg.train.generator_adapters.training import finetune_unet, train_generator

__all__ = [
    "SAMPLING",
    "GeneratorStudyConfig",
    "results_table",
    "run_study_config",
    "scenes_folder",
    "study_configs",
    "train_study_generator",
    "write_scenes",
]

logger = logging.getLogger(__name__)

# Stands for "all": what a world of any size would give is not far above.
ALL_SCENES = 2048
_MASKS = 64
_LAYERS = 20
# Of everything at once; pairs have the rate of their recipe.
_FULL_RATE = 1.2e-3
SAMPLING = SamplingConfig(images=1, steps=12, guidance=1.5, scheduler="ddim", batch=32)
_RANKED = ("probe", "least")
# Name, seed and domain: two sets of scenes that have nothing in common, and another domain.
_PROBES = (("day-1", 100, "clear-day"), ("day-2", 101, "clear-day"), ("night", 100, "night"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorStudyConfig:
    """One trained generator.

    Attributes:
        labelled: Training scenes.
        seed: Of scenes, pairs and batches.
        tuning: "lora", "full" or "none" (the base as it is).
        layers: A selection rule, or "probe", "least", "random": the layers that change most or
            least when everything is tuned, or any, as many of each.
        rank: r of the pairs.
        fusion: Whether plain and rectified attention are mixed by learned shares.
        rectified: Whether places look at the words of their own class, in training and sampling.
        steps: Training steps of 16 scenes.
        domain: Whose scenes.
    """

    labelled: int
    seed: int
    tuning: Literal["lora", "full", "none"] = "lora"
    layers: str = "cross"
    rank: int = 16
    fusion: bool = True
    rectified: bool = True
    steps: int = 400
    domain: str = "clear-day"

    @property
    def name(self) -> str:
        """A file name that tells the cell."""
        parts = [self.tuning, self.layers, f"r{self.rank}", f"n{self.labelled}"]
        parts += ["fusion" if self.fusion else "hard", "on" if self.rectified else "off"]
        return "-".join([*parts, f"t{self.steps}", self.domain, f"s{self.seed}"])


def study_configs(seeds: Sequence[int], steps: int = 400) -> list[GeneratorStudyConfig]:
    """Return the cells of the whole study, the most telling ones first."""
    found: list[GeneratorStudyConfig] = []
    for seed in seeds:
        one = partial(GeneratorStudyConfig, seed=seed, steps=steps)
        found += [one(labelled=n) for n in (16, 64, 256, ALL_SCENES)]
        found += [one(labelled=n, tuning="full", fusion=False) for n in (16, ALL_SCENES)]
        found += [one(labelled=16, tuning="none", fusion=False)]
        found += [one(labelled=16, fusion=False)]
    for seed in seeds:
        one = partial(GeneratorStudyConfig, seed=seed, steps=steps)
        found += [one(labelled=16, layers=rule) for rule in ("all", "probe", "random", "least")]
        found += [one(labelled=16, rank=rank) for rank in (1, 4, 64)]
        found += [one(labelled=n, fusion=False, rectified=False) for n in (16, ALL_SCENES)]
        found += [one(labelled=n, tuning="full", fusion=False) for n in (64, 256)]
    return found


def run_study_config(
    config: GeneratorStudyConfig, folder: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train and judge one cell, or read what was found before.

    Args:
        config: What to do.
        folder: Where datasets, cached latents and results lie.
        device: Where to work.
    """
    place = folder / "cells" / f"{config.name}.json"
    if place.is_file():
        return json.loads(place.read_text())
    torch.set_num_threads(1)
    started = time.perf_counter()
    base, conditioner, adapters, parameters = train_study_generator(config, folder, device)
    trained_s = time.perf_counter() - started
    base.to(device, torch.bfloat16)  # half the time of float32; the judge sees no difference
    found: dict[str, Any] = {**dataclasses.asdict(config), "parameters": parameters}
    for key, rectified in (("ruled", config.rectified), ("free", False)):
        if key == "free" and not config.rectified:
            continue
        found[key] = _score_masks(config, base, conditioner, adapters, rectified=rectified)
    found |= {"trained_s": round(trained_s, 1), "all_s": round(time.perf_counter() - started, 1)}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1))
    return found


def train_study_generator(
    config: GeneratorStudyConfig,
    folder: Path,
    device: str = "cpu",
    *,
    dataset: Path | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[DiffusionBase, Conditioner, list[GeneratorAdapter], int]:
    """Train the generator of a cell; return base, conditioner, adapters and trained parameters.

    Args:
        config: What to train.
        folder: Of the study.
        device: Where to train.
        dataset: A dataset folder to learn from instead of the cell's scenes.
        size: Height and width of its images.
    """
    base = load_diffusion("miniature", device=device)
    recipe = _recipe(config, base, folder)
    if size is not None:
        recipe = dataclasses.replace(recipe, view=dataclasses.replace(recipe.view, size=size))
    data, conditioner = _data(
        config, base, recipe, folder, dataset or scenes_folder(config, folder)
    )
    if config.tuning == "full":
        tuned = finetune_unet(base, data, recipe)
        base.unet.load_state_dict(tuned.unet)
        return base, conditioner, [], sum(value.numel() for value in tuned.unet.values())
    if config.tuning == "none":
        return base, conditioner, [], 0
    trained = train_generator(base, data, recipe)
    parameters = sum(p.down.numel() + p.up.numel() for p in trained.pairs.values())
    parameters += sum(value.numel() for value in trained.alphas.values())
    return base, conditioner, [trained.adapter(base, recipe)], parameters


def write_scenes(config: GeneratorStudyConfig, folder: Path) -> None:
    """Write the labelled scenes of a cell, the first of one stream a seed, unless they are there.

    The classes go by the words that the generator was pretrained with.
    """
    place = scenes_folder(config, folder)
    if not (place / "classes.json").is_file():
        write_dataset(config.domain, place, train=config.labelled, val=0, seed=1000 + config.seed)
        write_classes(place / "classes.json", LabelSpace(CLASSES))


def probe_layers(folder: Path, device: str = "cpu") -> None:
    """Rank the layers on two halves of 64 scenes and on another domain; keep the reports."""
    for name, seed, domain in _PROBES:
        place = folder / "reports" / f"{name}.json"
        if place.is_file():
            continue
        cell = GeneratorStudyConfig(
            labelled=32, seed=seed, tuning="full", fusion=False, domain=domain
        )
        write_scenes(cell, folder)
        base = load_diffusion("miniature", device=device)
        scenes = scenes_folder(cell, folder)
        data, _ = _data(cell, base, _recipe(cell, base, folder), folder, scenes)
        config = GradientProbeConfig(
            learning_rate=1e-4, batch_size=2, epochs=10, stop_overlap=0.95, precision="bf16"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(gradient_probe(base, data, config).to_bytes())


def reference_scores(domain: str = "clear-day") -> dict[str, Any]:
    """Return what the judge says of real scenes and of scenes through the codec."""
    base, (judge, names) = load_diffusion("miniature"), load_unet(WEIGHTS / "judge.safetensors")
    images, masks = render(domain, _MASKS, 0, "study-masks")
    with torch.inference_mode():
        coded = base.decode_latents(base.encode_images(torch.from_numpy(images), None)).numpy()
    real, codec = (
        measure_agreement(partial(predict_labels, judge), x, masks, names) for x in (images, coded)
    )
    return {"real": dataclasses.asdict(real), "ceiling": dataclasses.asdict(codec)}


def results_table(folder: Path) -> str:
    """Return the mean and the sample deviation over seeds of each kind of cell, as Markdown."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        kinds.setdefault(path.stem.rpartition("-s")[0], []).append(json.loads(path.read_text()))
    lines = [
        "| cell | values | seeds | right mask | wrong mask | drawn without regions |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in kinds.items():
        right = _mean_and_deviation([one["ruled"]["right"] for one in found])
        wrong = _mean_and_deviation([one["ruled"]["wrong"] for one in found])
        free = _mean_and_deviation([one["free"]["right"] for one in found if "free" in one])
        count = f"{found[0]['parameters']:,}"
        lines.append(f"| {kind} | {count} | {len(found)} | {right} | {wrong} | {free} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study or show its table."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.output
    if arguments.command == "table":
        sys.stdout.write(results_table(folder))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = study_configs(range(arguments.seeds), arguments.steps)[: arguments.most]
    for cell in work:
        write_scenes(cell, folder)
    job = partial(run_study_config, folder=folder, device=arguments.device)
    ranked = [cell for cell in work if cell.layers in _RANKED]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job, cell) for cell in work if cell not in ranked]
        if ranked:
            probe_layers(folder, arguments.device)
        futures += [pool.submit(job, cell) for cell in ranked]
        for number, future in enumerate(as_completed(futures), 1):
            found = future.result()
            cell = GeneratorStudyConfig(
                **{f.name: found[f.name] for f in dataclasses.fields(GeneratorStudyConfig)}
            )
            logger.info("%d/%d %s: %.3f", number, len(work), cell.name, found["ruled"]["right"])
    (folder / "references.json").write_text(json.dumps(reference_scores(), indent=1))
    sys.stdout.write(results_table(folder))


def _recipe(cell: GeneratorStudyConfig, base: DiffusionBase, folder: Path) -> GeneratorRecipe:
    usual = matchmask_miniature()
    full = cell.tuning == "full"
    return dataclasses.replace(
        usual,
        targets=_layers(cell, base, folder),
        rank=cell.rank,
        learning_rate=_FULL_RATE if full else usual.learning_rate,
        draws=DrawConfig(regions=cell.rectified, caption_dropout=0.1),
        fusion=AttentionMixConfig(mode="token" if cell.fusion else "off"),
        conditioning=_conditioning(cell),
        loop=dataclasses.replace(usual.loop, steps=cell.steps, precision="bf16"),
    )


def _conditioning(cell: GeneratorStudyConfig) -> ConditioningConfig:
    return ConditioningConfig(template=f"{{classes}} {DOMAINS[cell.domain].phrases[0]}")


def _layers(cell: GeneratorStudyConfig, base: DiffusionBase, folder: Path) -> str | tuple[str, ...]:
    names = [projection.name for projection in attention_projections(base.unet)]
    if cell.layers == "random":
        drawn = numpy_generator(cell.seed, "study", "layers").permutation(len(names))
        return tuple(names[index] for index in sorted(drawn[:_LAYERS]))
    if cell.layers in _RANKED:
        report = LayerReport.from_bytes((folder / "reports" / f"{_PROBES[0][0]}.json").read_bytes())
        if cell.layers == "probe":
            return select_from_report(report, top=_LAYERS, share=None)
        return bottom_k(report, _LAYERS)
    return cell.layers


def _data(
    cell: GeneratorStudyConfig,
    base: DiffusionBase,
    recipe: GeneratorRecipe,
    folder: Path,
    dataset_folder: Path,
) -> tuple[DenoisingData, Conditioner]:
    dataset = open_dataset(dataset_folder)
    conditioner = Conditioner(base.tokenizers, dataset.label_space, recipe.conditioning)
    keys = ("study", cell.name)
    views = CroppedImages(dataset, dataset.samples("train"), recipe.view, seed=cell.seed, keys=keys)
    cache = TensorCache(open_store(str(folder / "cache")))
    conditions = CropConditions(views, conditioner)
    return DenoisingData.prepare(base, views, conditions, recipe.draws, cache), conditioner


def scenes_folder(config: GeneratorStudyConfig, folder: Path) -> Path:
    """Return where the labelled scenes of a cell lie."""
    return folder / "data" / f"{config.domain}-{config.seed}-{config.labelled}"


def _score_masks(
    cell: GeneratorStudyConfig,
    base: DiffusionBase,
    conditioner: Conditioner,
    adapters: Sequence[GeneratorAdapter],
    *,
    rectified: bool,
) -> dict[str, Any]:
    judge, names = load_unet(WEIGHTS / "judge.safetensors")
    _, masks = render(cell.domain, _MASKS, 0, "study-masks")
    config = dataclasses.replace(SAMPLING, regions=rectified, precision="bf16")
    generator = Generator(base, conditioner, adapters=adapters, config=config)
    drawn = generator.generate([(str(index), mask) for index, mask in enumerate(masks)])
    images = np.stack([one.image for one in drawn])
    return dataclasses.asdict(
        measure_agreement(partial(predict_labels, judge), images, masks, names)
    )


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * float(np.mean(values)):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--most", type=int, help="only so many cells")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("study"), help="where results lie")
    return parser


if __name__ == "__main__":
    main()
