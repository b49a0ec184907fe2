"""Make the shipped weights and measure them.

python -m loraseg.miniature.pretrain clip      # about 25 minutes of one core
python -m loraseg.miniature.pretrain catseg    # about 5, needs the CLIP
python -m loraseg.miniature.pretrain gates     # measures both, prints JSON and writes gates.json
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

from loraseg.config import to_dict
from loraseg.miniature.captions import PROMPT, tokenizer
from loraseg.miniature.catseg_gates import catseg_report
from loraseg.miniature.catseg_training import CatsegTraining, train_catseg
from loraseg.miniature.clip_gates import clip_report
from loraseg.miniature.clip_model import CLIP_CONFIG
from loraseg.miniature.clip_training import ClipTraining, train_clip
from loraseg.miniature.weights_io import WEIGHTS, read_clip, write_clip
from loraseg.segment.catseg.checkpoint import load_catseg, save_catseg

__all__ = ["gates", "main", "make_catseg", "make_clip"]

logger = logging.getLogger(__name__)


def make_clip(config: ClipTraining, folder: Path) -> None:
    """Train the CLIP and write ``clip.safetensors``; a copy goes there every 250 steps."""
    path = folder / "clip.safetensors"
    write_clip(train_clip(config, lambda model, step: write_clip(model, path)), path)


def make_catseg(config: CatsegTraining, folder: Path) -> None:
    """Train the CAT-Seg around the CLIP in ``folder`` and write ``catseg.safetensors``."""
    model = train_catseg(config, read_clip(folder / "clip.safetensors"))
    header = {
        "vocabulary": json.dumps(tokenizer().vocabulary),
        "prompt": PROMPT,
        "mean": json.dumps(CLIP_CONFIG["mean"]),
        "std": json.dumps(CLIP_CONFIG["std"]),
    }
    save_catseg(model, folder / "catseg.safetensors", header, dtype=torch.float16)


def gates(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Measure the weights as they are shipped and compare them with their gates."""
    clip = clip_report(read_clip(folder / "clip.safetensors"), seed=seed)
    catseg = catseg_report(load_catseg(folder / "catseg.safetensors"), seed=seed)
    checks = {
        "domain_centroid_accuracy >= .95": clip["domain_centroid_accuracy"] >= 0.95,
        "dense_presence_auc_min >= .85": clip["dense_presence_auc_min"] >= 0.85,
        "base_miou >= .65": catseg["base_miou"] >= 0.65,
        "held_out_iou_mean >= .3": catseg["held_out_iou_mean"] >= 0.3,
        "held_out_iou_renamed_max <= .05": catseg["held_out_iou_renamed_max"] <= 0.05,
    }
    met = {gate: bool(value) for gate, value in checks.items()}
    return {"checks": met, "clip": clip, "catseg": catseg}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    folder: Path = arguments.folder
    if arguments.command == "gates":
        text = json.dumps(gates(folder, arguments.seed), indent=1)
        (folder / "gates.json").write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(text + "\n")
        return
    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    if arguments.command == "clip":
        going_on = {"init": arguments.init, "first_step": arguments.first_step}
        config = ClipTraining(seed=arguments.seed, **steps, **going_on)
        make_clip(config, folder)
    else:
        config = CatsegTraining(seed=arguments.seed, **steps)
        make_catseg(config, folder)
    seconds = time.perf_counter() - started
    logger.info("%s: %.0f s with %s", arguments.command, seconds, to_dict(config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["clip", "catseg", "gates"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps; default as in the code")
    parser.add_argument("--init", type=Path, help="clip: weights of an interrupted run")
    parser.add_argument("--first-step", type=int, default=1, help="clip: where to go on with it")
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where the weights lie")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
