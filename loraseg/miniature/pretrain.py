"""Pretraining and acceptance checks of the shipped weights.

python -m loraseg.miniature.pretrain clip      # about 25 minutes on one core
python -m loraseg.miniature.pretrain catseg    # about 5 minutes, needs the CLIP
python -m loraseg.miniature.pretrain gates     # checks both, prints JSON and writes gates.json
python -m loraseg.miniature.pretrain judge --device cuda        # minutes on a GPU
python -m loraseg.miniature.pretrain generator --device cuda    # more than ten minutes on a GPU
python -m loraseg.miniature.pretrain generator-gates            # writes generator_gates.json
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraseg.backbones.diffusion import load_diffusion
from loraseg.config import to_dict
from loraseg.miniature.models.catseg.checks import catseg_report
from loraseg.miniature.models.catseg.training import CatsegTrainingConfig, train_catseg
from loraseg.miniature.models.clip.checks import clip_report
from loraseg.miniature.models.clip.model import CLIP_CONFIG
from loraseg.miniature.models.clip.training import ClipTrainingConfig, train_clip
from loraseg.miniature.models.generator.checks import domain_report, judge_report, word_report
from loraseg.miniature.models.generator.model import build_text_encoder, write_pipeline
from loraseg.miniature.models.generator.scenes import draw_scenes
from loraseg.miniature.models.generator.training import (
    GeneratorTrainingConfig,
    train_codec,
    train_judge,
    train_text_to_image,
)
from loraseg.miniature.models.weights_io import WEIGHTS, read_clip, write_clip
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.captions import PROMPT, tokenizer
from loraseg.segment.closed_set.checkpoint import (
    encode_closed_set_segmenter,
    load_closed_set_segmenter,
)
from loraseg.segment.open_vocabulary.catseg.checkpoint import load_catseg, save_catseg

__all__ = [
    "check_generator",
    "check_models",
    "main",
    "make_catseg",
    "make_clip",
    "make_generator",
    "make_judge",
]

logger = logging.getLogger(__name__)

_COMMANDS = ("clip", "catseg", "gates", "judge", "generator", "generator-gates")


def make_clip(config: ClipTrainingConfig, folder: Path) -> None:
    """Train the CLIP and write ``clip.safetensors``, also every 250 steps."""
    path = folder / "clip.safetensors"
    write_clip(train_clip(config, lambda model, step: write_clip(model, path)), path)


def make_catseg(config: CatsegTrainingConfig, folder: Path) -> None:
    """Train the CAT-Seg with the CLIP in ``folder`` and write ``catseg.safetensors``."""
    model = train_catseg(config, read_clip(folder / "clip.safetensors"))
    header = {
        "vocabulary": json.dumps(tokenizer().vocabulary),
        "prompt": PROMPT,
        "mean": json.dumps(CLIP_CONFIG["mean"]),
        "std": json.dumps(CLIP_CONFIG["std"]),
    }
    save_catseg(model, folder / "catseg.safetensors", header, dtype=torch.float16)


def make_judge(config: GeneratorTrainingConfig, folder: Path, *, processes: int = 1) -> None:
    """Train the judge and write ``judge.safetensors``."""
    scenes = draw_scenes(config.scenes, config.seed, processes=processes)
    judge = train_judge(config, scenes)
    data = encode_closed_set_segmenter(judge, CLASSES, dtype=torch.float16)
    (folder / "judge.safetensors").write_bytes(data)


def make_generator(
    config: GeneratorTrainingConfig, folder: Path, *, init: Path | None = None, processes: int = 1
) -> None:
    """Train the text-to-image model and write ``generator/``, also during training.

    Args:
        config: Settings.
        folder: Parent of the folder ``generator``.
        init: A generator folder to continue from. Its codec is kept, since its UNet was trained on
            the latents of that codec.
        processes: Number of processes that render scenes.
    """
    scenes = draw_scenes(config.scenes, config.seed, processes=processes)
    start = None
    if init is None:
        codec = train_codec(config, scenes)
    else:
        base = load_diffusion(str(init))
        codec = base.vae.to(config.device)
        start = base.unet

    def write(unet: torch.nn.Module, step: int) -> None:
        text_encoder = build_text_encoder()
        write_pipeline(folder / "generator", unet=unet, codec=codec, text_encoder=text_encoder)
        logger.info("generator: written after %d steps", step)

    write(train_text_to_image(config, codec, scenes, write, init=start), config.steps)


def check_models(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Measure CLIP and CAT-Seg in ``folder`` and compare the figures with their thresholds."""
    clip = clip_report(read_clip(folder / "clip.safetensors"), seed=seed)
    catseg = catseg_report(load_catseg(folder / "catseg.safetensors"), seed=seed)
    checks = {
        "domain_centroid_accuracy >= .95": clip["domain_centroid_accuracy"] >= 0.95,
        "dense_presence_auc_min >= .85": clip["dense_presence_auc_min"] >= 0.85,
        "base_miou >= .65": catseg["base_miou"] >= 0.65,
        "held_out_iou_mean >= .3": catseg["held_out_iou_mean"] >= 0.3,
        "held_out_iou_renamed_max <= .05": catseg["held_out_iou_renamed_max"] <= 0.05,
    }
    results = {name: bool(value) for name, value in checks.items()}
    return {"checks": results, "clip": clip, "catseg": catseg}


def check_generator(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Measure generator and judge in ``folder`` and compare the figures with their thresholds.

    Figures that need adapters, such as the agreement with masks, are measured by
    :mod:`loraseg.miniature.studies.generator`.
    """
    base = load_diffusion(str(folder / "generator"))
    judge = load_closed_set_segmenter(folder / "judge.safetensors")
    judge_figures = judge_report(judge, base, seed=seed)
    words = word_report(judge, base, seed=seed)
    checks = {
        "judge_miou_mean >= .85": judge_figures["judge_miou_mean"] >= 0.85,
        "object_word_auc_mean >= .8": words["object_word_auc_mean"] >= 0.8,
    }
    return {
        "checks": {name: bool(value) for name, value in checks.items()},
        "judge": judge_figures,
        "object_words": words,
        "domain_words": domain_report(read_clip(folder / "clip.safetensors"), base, seed=seed),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of the command line."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(arguments.threads)
    checks = {"gates": check_models, "generator-gates": check_generator}
    if arguments.command in checks:
        text = json.dumps(checks[arguments.command](arguments.folder, arguments.seed), indent=1)
        name = f"{arguments.command.replace('-', '_')}.json"
        (arguments.folder / name).write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(text + "\n")
        return
    started = time.perf_counter()
    config = _train(arguments)
    seconds = time.perf_counter() - started
    logger.info("%s: %.0f s with %s", arguments.command, seconds, to_dict(config))


def _train(
    arguments: argparse.Namespace,
) -> ClipTrainingConfig | CatsegTrainingConfig | GeneratorTrainingConfig:
    """Train the models of a command and return the settings."""
    folder, seed = arguments.folder, arguments.seed
    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    if arguments.command == "clip":
        start = {"init": arguments.init, "first_step": arguments.first_step}
        clip = ClipTrainingConfig(seed=seed, **steps, **start)
        make_clip(clip, folder)
        return clip
    if arguments.command == "catseg":
        catseg = CatsegTrainingConfig(seed=seed, **steps)
        make_catseg(catseg, folder)
        return catseg
    if arguments.command == "judge":
        steps = {f"judge_{name}": value for name, value in steps.items()}
    device = arguments.device
    config = GeneratorTrainingConfig(seed=seed, device=device, compiled=device != "cpu", **steps)
    if arguments.command == "judge":
        make_judge(config, folder, processes=arguments.threads)
    else:
        make_generator(config, folder, init=arguments.init, processes=arguments.threads)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps; default: that of the model")
    parser.add_argument("--init", type=Path, help="clip, generator: weights to continue from")
    parser.add_argument("--first-step", type=int, default=1, help="clip: first step with --init")
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads, and processes that render scenes"
    )
    parser.add_argument("--device", default="cpu", help="generator, judge: device of the training")
    return parser


if __name__ == "__main__":
    main()
