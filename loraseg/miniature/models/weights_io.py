"""The shipped CLIP weights: float16 safetensors with the config in the header."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from loraseg.errors import IntegrityError
from loraseg.miniature.models.clip.model import CLIP_CONFIG, build_clip
from loraseg.miniature.world.captions import tokenizer
from loraseg.storage.safetensors_io import encode_safetensors

__all__ = ["WEIGHTS", "read_clip", "write_clip"]

WEIGHTS = Path(__file__).parents[1] / "weights"


def write_clip(model: nn.Module, path: Path) -> None:
    """Write the weights under open_clip's names.

    The header has ``config``, the arguments of ``open_clip.model.CLIP`` with mean and standard
    deviation of the pixels, and ``vocabulary``, the words of the tokenizer in the order of ids.
    """
    words = tokenizer()
    config = {
        **CLIP_CONFIG,
        "text_cfg": {**CLIP_CONFIG["text_cfg"], "vocab_size": words.vocab_size},
    }
    tensors = {
        name: tensor.detach().half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    header = {"config": json.dumps(config), "vocabulary": json.dumps(words.vocabulary)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_safetensors(tensors, header))


def read_clip(path: Path) -> nn.Module:
    """Read the weights as float32.

    Raises:
        IntegrityError: The vocabulary of the file differs from the package's.
    """
    words = tokenizer()
    with safe_open(path, "pt") as file:
        vocabulary = json.loads(file.metadata()["vocabulary"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tuple(vocabulary) != words.vocabulary:
        raise IntegrityError(f"{path}: its vocabulary differs from the package's")
    model = build_clip(words.vocab_size)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
    return model.eval()
