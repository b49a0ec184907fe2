"""Look at what loraseg stands on: versions, devices, torchvision, and a store if one is named."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from loraseg.adapters import targets
from loraseg.backbones.device import best_device
from loraseg.compat import prepare_torchvision
from loraseg.errors import LorasegError
from loraseg.fuse.merging import measure_table, save_table
from loraseg.revision import code_revision
from loraseg.segment.base import load_base
from loraseg.storage import open_store, probe_conditional_writes

__all__ = ["Finding", "examine", "measure_merging"]

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "peft", "ray", "boto3", "numpy", "pyarrow")

# (d_out, d_in) in the towers of ViT-B/16 and ViT-L/14 and in CAT-Seg's aggregator.
_COMMON_SHAPES = (
    *((768, 768), (3072, 768), (768, 3072), (512, 512), (2048, 512), (512, 2048)),
    *((1024, 1024), (4096, 1024), (1024, 4096), (128, 256), (128, 128), (512, 128), (128, 512)),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination; ``is_well`` is False where something has to be done."""

    what: str
    state: str
    is_well: bool = True


def examine(store: str | None = None) -> Iterator[Finding]:
    """Yield findings, the store's last.

    Args:
        store: URI of a store to probe for conditional writes, which publishing relies on. The
            probe writes and deletes one small object.
    """
    yield Finding("loraseg", code_revision())
    yield Finding("python", platform.python_version())
    for package in _PACKAGES:
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed; run pip install -e .", is_well=False)
    yield Finding("device", _device())
    yield _torchvision()
    if store is not None:
        yield _store(store)


def measure_merging(base: str = "miniature") -> Finding:
    """Measure from how many tokens on merging adapters pays on this device, and keep the table.

    Args:
        base: Whose layers to measure with, besides those of ViT-B/16 and ViT-L/14.
    """
    device, dtype = best_device(), torch.float32
    model = load_base(base).model
    adapted = set(targets(model))
    shapes = {
        (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if name in adapted and isinstance(layer, nn.Linear)
    }
    table = measure_table([*sorted(shapes), *_COMMON_SHAPES], device, dtype)
    path = save_table(table, device, dtype)
    return Finding("merging", f"{len(table.measured)} layer shapes measured, kept in {path}")


def _device() -> str:
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"CUDA {torch.version.cuda}: {', '.join(names)}"
    return f"CPU, {torch.get_num_threads()} threads"


def _torchvision() -> Finding:
    prepare_torchvision()
    try:
        import torchvision  # pyright: ignore[reportUnusedImport]  # noqa: F401
    except (ImportError, RuntimeError) as error:
        state = f"does not import ({error}); install the wheel that belongs to this torch"
        return Finding("torchvision import", state, is_well=False)
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        return Finding("torchvision import", "works, without compiled operators (none is needed)")
    return Finding("torchvision import", "works, compiled operators too")


def _store(uri: str) -> Finding:
    try:
        probe_conditional_writes(open_store(uri))
    except LorasegError as error:
        return Finding(f"store {uri}", str(error), is_well=False)
    return Finding(f"store {uri}", "conditional writes work: of racing writers one wins")
