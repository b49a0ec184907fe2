"""A tiny base, encoder and task as files, so that a whole task runs in a second."""

import functools
import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from loraseg.segment.open_vocabulary.catseg.checkpoint import save_catseg
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.tasks import SegmenterAdapterTask
from tests.tiny_training import write_domain
from tests.unit.tiny import WORDS, tiny_base

RECIPE = {
    "rank": 2,
    "batch_size": 2,
    "augment": {"crop": 16, "shortest_edge": [16]},
    "loop": {"steps": 6, "warmup_steps": 2, "checkpoint_every": 2},
}


def write_base(path):
    base = tiny_base()
    metadata = {"vocabulary": json.dumps(base.tokenizer.vocabulary), "prompt": base.prompt}
    save_catseg(base.model, path, metadata)
    return path


def write_clip(path):
    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 16,
            "layers": 1,
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": len(WORDS) + 7,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
    }
    model = CLIP(
        config["embed_dim"],
        CLIPVisionCfg(**config["vision_cfg"]),
        CLIPTextCfg(**config["text_cfg"]),
    )
    header = {"config": json.dumps(config), "vocabulary": json.dumps(WORDS)}
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata=header)
    return path


@functools.cache
def _weights():
    """Write each file once: the order of header strings differs between writes."""
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base.safetensors")
        clip = write_clip(Path(folder) / "clip.safetensors")
        return {path.name: path.read_bytes() for path in (base, clip)}


def tiny_task(folder, name="fog", recipe=RECIPE, **changes):
    """Write the missing files below ``folder`` and return a task on them."""
    if not (folder / "base.safetensors").exists():
        for file_name, data in _weights().items():
            (folder / file_name).write_bytes(data)
    if not (folder / name).exists():
        write_domain(folder / name, name)
    return SegmenterAdapterTask(
        **{
            "name": name,
            "data": str(folder / name),
            "base": str(folder / "base.safetensors"),
            "encoder": str(folder / "clip.safetensors"),
            "recipe": named_recipe("miniature", recipe),
            "library": str(folder / "library"),
            "checkpoints": str(folder / "checkpoints"),
            **changes,
        }
    )
