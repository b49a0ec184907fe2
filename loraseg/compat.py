"""Make ``import torchvision`` work beside a CPU-only torch.

The torchvision wheel on PyPI is linked to CUDA torch. Beside a ``+cpu`` torch its compiled
operators cannot load, and its Python half then fails at import time with "operator
torchvision::nms does not exist", which takes open_clip, peft and timm down with it although none
of them needs an operator. Declaring the two operator schemas that torchvision registers fake
kernels for is enough. With a torchvision whose operators do load, nothing here runs.
"""

import importlib.util
from pathlib import Path

import torch

__all__ = ["prepare_torchvision"]

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Declare torchvision's operator schemas if its compiled operators cannot be loaded.

    Call it before ``import open_clip``, ``import peft`` or ``import timm``. Idempotent and cheap.
    """
    global _library  # a torch Library lives as long as the operators that it declared
    if _library is not None or _operators_load():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    extensions = list(Path(spec.origin).parent.glob("_C*.so")) + list(
        Path(spec.origin).parent.glob("_C*.pyd")
    )
    try:
        for extension in extensions:
            torch.ops.load_library(str(extension))
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
