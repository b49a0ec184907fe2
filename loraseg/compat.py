"""Make ``import torchvision`` work with a CPU-only torch.

The torchvision wheel on PyPI is linked against CUDA torch. With a ``+cpu`` torch its compiled
operators cannot be loaded, and ``import torchvision`` fails with "operator torchvision::nms does
not exist". Importing open_clip, peft or timm then fails as well, although none of them uses an
operator. It is enough to declare the schemas of the two operators for which torchvision registers
fake kernels. If the compiled operators can be loaded, this module does nothing.
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
    global _library  # keep the Library alive: its deletion would remove the schemas
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
