"""Check the installation: versions, device, torchvision and, optionally, a store."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from torch import nn

from loraseg.adapters import target_modules
from loraseg.backbones.device import best_device
from loraseg.checks import Check
from loraseg.compat import prepare_torchvision
from loraseg.errors import LorasegError
from loraseg.fuse.merging import measure_table, save_table
from loraseg.revision import code_revision
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.storage import open_store, probe_conditional_writes

__all__ = ["measure_merging", "run_checks"]

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "peft", "ray", "boto3", "numpy", "pyarrow")

# (d_out, d_in) of the linear layers in ViT-B/16, ViT-L/14 and CAT-Seg's aggregator.
_COMMON_SHAPES = (
    *((768, 768), (3072, 768), (768, 3072), (512, 512), (2048, 512), (512, 2048)),
    *((1024, 1024), (4096, 1024), (1024, 4096), (128, 256), (128, 128), (512, 128), (128, 512)),
)


def run_checks(store: str | None = None) -> Iterator[Check]:
    """Check packages and device, then the store.

    Args:
        store: URI of a store to check for conditional writes, which publishing requires; None
            for no store. The check writes and deletes one small object.

    Yields:
        One result per check.
    """
    yield Check("loraseg", code_revision())
    yield Check("python", platform.python_version())
    for package in _PACKAGES:
        try:
            yield Check(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "not installed; run pip install -e .", ok=False)
    yield Check("device", _device_description())
    yield _check_torchvision()
    if store is not None:
        yield _check_store(store)


def measure_merging(base: str = "miniature") -> Check:
    """Measure the number of tokens above which merging adapters is faster, and store the table.

    Args:
        base: Base whose layer shapes are measured in addition to those of ViT-B/16 and ViT-L/14.
    """
    device, dtype = best_device(), torch.float32
    model = load_base(base).model
    adapted = set(target_modules(model))
    shapes = {
        (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if name in adapted and isinstance(layer, nn.Linear)
    }
    table = measure_table([*sorted(shapes), *_COMMON_SHAPES], device, dtype)
    path = save_table(table, device, dtype)
    return Check("merging", f"{len(table.measured)} layer shapes measured, stored in {path}")


def _device_description() -> str:
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"CUDA {torch.version.cuda}: {', '.join(names)}"
    return f"CPU, {torch.get_num_threads()} threads"


def _check_torchvision() -> Check:
    prepare_torchvision()
    try:
        import torchvision  # pyright: ignore[reportUnusedImport]  # noqa: F401
    except (ImportError, RuntimeError) as error:
        state = f"fails ({error}); install the torchvision wheel that matches this torch"
        return Check("torchvision import", state, ok=False)
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        return Check("torchvision import", "works without compiled operators; loraseg needs none")
    return Check("torchvision import", "works, with compiled operators")


def _check_store(uri: str) -> Check:
    try:
        probe_conditional_writes(open_store(uri))
    except LorasegError as error:
        return Check(f"store {uri}", str(error), ok=False)
    return Check(f"store {uri}", "conditional writes work")
