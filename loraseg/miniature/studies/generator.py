"""Study of how well generators follow masks, by labels, tuned layers, rank and attention mix.

python -m loraseg.miniature.studies.generator --seeds 3 --processes 2 --output study
python -m loraseg.miniature.studies.generator table --output study      # table of the results

Each configuration trains a generator on labelled scenes, generates images of held-out masks and
measures their agreement with the judge. Results are stored in one file per configuration; a second
run computes the missing ones.
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
from loraseg.miniature.studies.measures import mean_and_deviation
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.dataset import write_dataset
from loraseg.miniature.world.domains import DOMAINS
from loraseg.miniature.world.render import render
from loraseg.probes.gradient import GradientProbeConfig, gradient_probe
from loraseg.seeding import numpy_generator
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
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

# Number of scenes that stands for "all"; more scenes would improve the results little.
ALL_SCENES = 2048
_MASKS = 64
_LAYERS = 20
# Learning rate of full tuning; LoRA uses that of its recipe.
_FULL_RATE = 1.2e-3
SAMPLING = SamplingConfig(images=1, steps=12, guidance=1.5, scheduler="ddim", batch=32)
_RANKED = ("probe", "least")
# Name, seed and domain of the probes: two disjoint sets of scenes, and another domain.
_PROBES = (("day-1", 100, "clear-day"), ("day-2", 101, "clear-day"), ("night", 100, "night"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorStudyConfig:
    """Configuration of a trained generator.

    Attributes:
        labelled: Number of training scenes.
        seed: Seed of scenes, LoRA pairs and batches.
        tuning: "lora", "full", or "none" for the base without training.
        layers: A selection rule; or "probe", "least" or "random" for 20 layers: those that change
            most or least in full tuning, or random ones.
        rank: Rank r of LoRA.
        fusion: Whether plain and rectified attention are mixed with learned shares.
        rectified: Whether training and sampling use rectified cross-attention, in which a pixel
            attends only to the words of its own class.
        steps: Training steps of 16 scenes.
        domain: Domain of the scenes.
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
        """File name of the results."""
        parts = [self.tuning, self.layers, f"r{self.rank}", f"n{self.labelled}"]
        parts += ["fusion" if self.fusion else "hard", "on" if self.rectified else "off"]
        return "-".join([*parts, f"t{self.steps}", self.domain, f"s{self.seed}"])


def study_configs(seeds: Sequence[int], steps: int = 400) -> list[GeneratorStudyConfig]:
    """Return the configurations of the whole study, the most informative ones first."""
    configs: list[GeneratorStudyConfig] = []
    for seed in seeds:
        config = partial(GeneratorStudyConfig, seed=seed, steps=steps)
        configs += [config(labelled=n) for n in (16, 64, 256, ALL_SCENES)]
        configs += [config(labelled=n, tuning="full", fusion=False) for n in (16, ALL_SCENES)]
        configs += [config(labelled=16, tuning="none", fusion=False)]
        configs += [config(labelled=16, fusion=False)]
    for seed in seeds:
        config = partial(GeneratorStudyConfig, seed=seed, steps=steps)
        configs += [
            config(labelled=16, layers=rule) for rule in ("all", "probe", "random", "least")
        ]
        configs += [config(labelled=16, rank=rank) for rank in (1, 4, 64)]
        configs += [config(labelled=n, fusion=False, rectified=False) for n in (16, ALL_SCENES)]
        configs += [config(labelled=n, tuning="full", fusion=False) for n in (64, 256)]
    return configs


def run_study_config(
    config: GeneratorStudyConfig, folder: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train and score one configuration, or read its stored results.

    Args:
        config: The configuration.
        folder: Folder of datasets, cached latents and results.
        device: Device of training and sampling.
    """
    path = folder / "cells" / f"{config.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    started = time.perf_counter()
    base, conditioner, adapters, parameters = train_study_generator(config, folder, device)
    trained_s = time.perf_counter() - started
    base.to(device, torch.bfloat16)  # half the time of float32, with the same scores
    results: dict[str, Any] = {**dataclasses.asdict(config), "parameters": parameters}
    for key, rectified in (("ruled", config.rectified), ("free", False)):
        if key == "free" and not config.rectified:
            continue
        results[key] = _score_masks(config, base, conditioner, adapters, rectified=rectified)
    results |= {"trained_s": round(trained_s, 1), "all_s": round(time.perf_counter() - started, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    return results


def train_study_generator(
    config: GeneratorStudyConfig,
    folder: Path,
    device: str = "cpu",
    *,
    dataset: Path | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[DiffusionBase, Conditioner, list[GeneratorAdapter], int]:
    """Train a generator; return base, conditioner, adapters and the number of trained parameters.

    Args:
        config: The configuration.
        folder: Folder of the study.
        device: Device of the training.
        dataset: A dataset folder to train on instead of the scenes of the configuration.
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
    """Write the labelled scenes of a configuration as a dataset folder, unless it exists.

    The scenes are the first ones of a stream that depends on the seed. The class names are the
    words of the generator's pretraining.
    """
    path = scenes_folder(config, folder)
    if not (path / "classes.json").is_file():
        write_dataset(config.domain, path, train=config.labelled, val=0, seed=1000 + config.seed)
        write_classes(path / "classes.json", LabelSpace(CLASSES))


def probe_layers(folder: Path, device: str = "cpu") -> None:
    """Run the gradient probe on two disjoint sets of 32 scenes and on another domain."""
    for name, seed, domain in _PROBES:
        path = folder / "reports" / f"{name}.json"
        if path.is_file():
            continue
        config = GeneratorStudyConfig(
            labelled=32, seed=seed, tuning="full", fusion=False, domain=domain
        )
        write_scenes(config, folder)
        base = load_diffusion("miniature", device=device)
        scenes = scenes_folder(config, folder)
        data, _ = _data(config, base, _recipe(config, base, folder), folder, scenes)
        probe_config = GradientProbeConfig(
            learning_rate=1e-4, batch_size=2, epochs=10, stop_overlap=0.95, precision="bf16"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gradient_probe(base, data, probe_config).to_bytes())


def reference_scores(domain: str = "clear-day") -> dict[str, Any]:
    """Return the agreement of masks with rendered scenes, and with scenes after the codec."""
    base = load_diffusion("miniature")
    judge = load_closed_set_segmenter(WEIGHTS / "judge.safetensors")
    names = judge.label_space.names
    images, masks = render(domain, _MASKS, 0, "study-masks")
    with torch.inference_mode():
        coded = base.decode_latents(base.encode_images(torch.from_numpy(images), None)).numpy()
    real, codec = (measure_agreement(judge.labels, x, masks, names) for x in (images, coded))
    return {"real": dataclasses.asdict(real), "ceiling": dataclasses.asdict(codec)}


def results_table(folder: Path) -> str:
    """Return a Markdown table: mean and sample deviation over seeds of each configuration."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        kinds.setdefault(path.stem.rpartition("-s")[0], []).append(json.loads(path.read_text()))
    lines = [
        "| config | values | seeds | right mask | wrong mask | drawn without regions |",
        "|---|---|---|---|---|---|",
    ]
    for kind, runs in kinds.items():
        right = mean_and_deviation([run["ruled"]["right"] for run in runs])
        wrong = mean_and_deviation([run["ruled"]["wrong"] for run in runs])
        free = mean_and_deviation([run["free"]["right"] for run in runs if "free" in run])
        count = f"{runs[0]['parameters']:,}"
        lines.append(f"| {kind} | {count} | {len(runs)} | {right} | {wrong} | {free} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study or print its table."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.output
    if arguments.command == "table":
        sys.stdout.write(results_table(folder))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    configs = study_configs(range(arguments.seeds), arguments.steps)[: arguments.most]
    for config in configs:
        write_scenes(config, folder)
    job = partial(run_study_config, folder=folder, device=arguments.device)
    ranked = [config for config in configs if config.layers in _RANKED]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job, config) for config in configs if config not in ranked]
        if ranked:
            probe_layers(folder, arguments.device)
        futures += [pool.submit(job, config) for config in ranked]
        for number, future in enumerate(as_completed(futures), 1):
            results = future.result()
            config = GeneratorStudyConfig(
                **{f.name: results[f.name] for f in dataclasses.fields(GeneratorStudyConfig)}
            )
            logger.info(
                "%d/%d %s: %.3f", number, len(configs), config.name, results["ruled"]["right"]
            )
    (folder / "references.json").write_text(json.dumps(reference_scores(), indent=1))
    sys.stdout.write(results_table(folder))


def _recipe(config: GeneratorStudyConfig, base: DiffusionBase, folder: Path) -> GeneratorRecipe:
    recipe = matchmask_miniature()
    full = config.tuning == "full"
    return dataclasses.replace(
        recipe,
        targets=_layers(config, base, folder),
        rank=config.rank,
        learning_rate=_FULL_RATE if full else recipe.learning_rate,
        draws=DrawConfig(regions=config.rectified, caption_dropout=0.1),
        fusion=AttentionMixConfig(mode="token" if config.fusion else "off"),
        conditioning=_conditioning(config),
        loop=dataclasses.replace(recipe.loop, steps=config.steps, precision="bf16"),
    )


def _conditioning(config: GeneratorStudyConfig) -> ConditioningConfig:
    return ConditioningConfig(template=f"{{classes}} {DOMAINS[config.domain].phrases[0]}")


def _layers(
    config: GeneratorStudyConfig, base: DiffusionBase, folder: Path
) -> str | tuple[str, ...]:
    names = [projection.name for projection in attention_projections(base.unet)]
    if config.layers == "random":
        drawn = numpy_generator(config.seed, "study", "layers").permutation(len(names))
        return tuple(names[index] for index in sorted(drawn[:_LAYERS]))
    if config.layers in _RANKED:
        report = LayerReport.from_bytes((folder / "reports" / f"{_PROBES[0][0]}.json").read_bytes())
        if config.layers == "probe":
            return select_from_report(report, top=_LAYERS, share=None)
        return bottom_k(report, _LAYERS)
    return config.layers


def _data(
    config: GeneratorStudyConfig,
    base: DiffusionBase,
    recipe: GeneratorRecipe,
    folder: Path,
    dataset_folder: Path,
) -> tuple[DenoisingData, Conditioner]:
    dataset = open_dataset(dataset_folder)
    conditioner = Conditioner(base.tokenizers, dataset.label_space, recipe.conditioning)
    keys = ("study", config.name)
    views = CroppedImages(
        dataset, dataset.samples("train"), recipe.view, seed=config.seed, keys=keys
    )
    cache = TensorCache(open_store(str(folder / "cache")))
    conditions = CropConditions(views, conditioner)
    return DenoisingData.prepare(base, views, conditions, recipe.draws, cache), conditioner


def scenes_folder(config: GeneratorStudyConfig, folder: Path) -> Path:
    """Return the dataset folder of the labelled scenes."""
    return folder / "data" / f"{config.domain}-{config.seed}-{config.labelled}"


def _score_masks(
    config: GeneratorStudyConfig,
    base: DiffusionBase,
    conditioner: Conditioner,
    adapters: Sequence[GeneratorAdapter],
    *,
    rectified: bool,
) -> dict[str, Any]:
    judge = load_closed_set_segmenter(WEIGHTS / "judge.safetensors")
    _, masks = render(config.domain, _MASKS, 0, "study-masks")
    sampling = dataclasses.replace(SAMPLING, regions=rectified, precision="bf16")
    generator = Generator(base, conditioner, adapters=adapters, config=sampling)
    samples = generator.generate([(str(index), mask) for index, mask in enumerate(masks)])
    images = np.stack([sample.image for sample in samples])
    return dataclasses.asdict(
        measure_agreement(judge.labels, images, masks, judge.label_space.names)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--most", type=int, help="largest number of configurations")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("study"), help="folder of the results")
    return parser


if __name__ == "__main__":
    main()
