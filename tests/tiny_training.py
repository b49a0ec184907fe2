"""Dataset folders, models of random weights and a manifest: training takes seconds."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image

from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.compat import prepare_torchvision
from loraseg.data import LabelSpace, write_classes, write_mask
from loraseg.segment.open_vocabulary.catseg.checkpoint import save_catseg
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from tests.tiny_sizes import tiny_config

LABELS = LabelSpace(("sky", "road", "car"))
_COLORS = np.array([[90, 140, 220], [90, 90, 90], [200, 40, 40]], dtype=np.float64)
_TINTS = {"fog": (0.4, 1.0, 120.0), "night": (0.3, 0.9, 0.0)}


def write_domain(
    folder: Path, domain: str, *, train: int = 4, val: int = 2, side: int = 64
) -> Path:
    """Write sky over road with a car, in the colours of fog or night."""
    write_classes(_make_parent(folder / "classes.json"), LABELS)
    scale, blue, offset = _TINTS[domain]
    generator = np.random.default_rng(list(domain.encode()))
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            mask = _scene(generator, 64)
            image = (
                _COLORS[mask] * scale * (1, 1, blue) + offset + generator.normal(0, 8, (1, 1, 3))
            )
            pixels = image.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(_make_parent(folder / "images" / split / f"{index}.png"))
            write_mask(_make_parent(folder / "masks" / split / f"{index}.png"), mask, LABELS)
    return folder


def write_models(folder: Path) -> dict[str, str]:
    """Write a random CAT-Seg and a random CLIP; return the manifest's fields that name them."""
    words = ("a", "photo", "of", "in", "the", "scene", *LABELS.names)
    tokenizer = WordTokenizer(words, context_length=12, buckets=4)
    torch.manual_seed(0)
    base, encoder = folder / "base.safetensors", folder / "encoder.safetensors"
    config = tiny_config(tokenizer.vocab_size, image_size=64, patch=16)
    save_catseg(CATSeg(config), base, {"vocabulary": json.dumps(words)})
    _write_clip(encoder, words, tokenizer.vocab_size)
    return {"base": str(base), "encoder": str(encoder)}


def _write_clip(path: Path, words: tuple[str, ...], vocab_size: int) -> None:
    prepare_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 64}
    text = {"context_length": 12, "vocab_size": vocab_size, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(12, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    header = {
        "config": json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}),
        "vocabulary": json.dumps(words),
    }
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata=header)


def write_manifest(path: Path, uri: str, data: dict[str, Path], **fields) -> Path:
    """Write a manifest with library and checkpoints below ``uri`` and few steps."""
    values = {
        "library": f"{uri}/library",
        "checkpoints": f"{uri}/checkpoints",
        "overrides": {"batch_size": 2, "loop": {"steps": 30, "checkpoint_every": 10}},
        "domains": [{"name": name, "data": str(folder)} for name, folder in data.items()],
    }
    path.write_text(yaml.safe_dump({**values, **fields}), encoding="utf-8")
    return path


def _scene(generator: np.random.Generator, side: int) -> np.ndarray:
    mask = np.zeros((side, side), dtype=np.uint8)
    horizon = int(generator.integers(side // 3, side // 2))
    mask[horizon:] = 1
    top, left = generator.integers(horizon, side - side // 4), generator.integers(0, side // 2)
    mask[top : top + side // 5, left : left + side // 3] = 2
    return mask


def _make_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
