"""loraseg: train, store, retrieve and serve LoRA adapters for semantic segmentation.

The public names below are loaded on first use, so ``import loraseg`` loads neither torch nor
pyarrow. Ray is never imported by this package; it is used by ``actors`` and ``jobs``.

>>> import loraseg
>>> segmenter = loraseg.load_segmenter(library="runs/quickstart/library")
>>> [result] = segmenter.segment([image], ["road", "car"])  # image: uint8 (h, w, 3), RGB

Papers and the parts of loraseg that implement them:

========================================================================  =======================
paper                                                                     implemented by
========================================================================  =======================
SemLA: "Semantic Library Adaptation: LoRA Retrieval and Fusion for        library, fuse,
Open-Vocabulary Semantic Segmentation". Qorbani et al., CVPR 2025,        inference,
arXiv 2503.21780                                                          train.segmenter_adapters
MatchMask: "MatchMask: Mask-Centric Generative Data Augmentation for      synth, probes,
Label-Scarce Semantic Segmentation". Lin et al., CVPR 2026                batch.synthesize,
                                                                          batch.matchmask_pp,
                                                                          train.generator_adapters
RecycleLoRA: "RecycleLoRA: Rank-Revealing QR-Based Dual-LoRA Subspace     planned
Adaptation for Domain Generalized Semantic Segmentation". Cho, Yun,
Jeon, Moon, Ro, CVPR 2026 Findings, arXiv 2603.28142
CA-LoRA: "Concept-Aware LoRA for Domain-Aligned Segmentation Dataset      planned
Generation". Park et al., CVPR 2026, arXiv 2503.22172
ChimeraLoRA: "ChimeraLoRA: Multi-Head LoRA-Guided Synthetic Datasets".    planned
Kim, Jang, Koo, Yun, Ok, CVPR 2026, arXiv 2602.19708
========================================================================  =======================

Packages, from the top layer to the bottom; a package imports only from the layers below its own::

    cli                            command line
    serving    client              HTTP endpoint, and the client for it
    miniature                      built-in test world and its small pretrained models
    probes                         layer rankings
    batch                          resumable jobs over many images or masks
    train      evaluate            training and scoring
    inference                      load models and adapters; segment and generate
    library    segment    synth    adapter store; segmentation models; mask-to-image generation
    backbones  fuse       reports  frozen models; weighted sums of adapters; HTML pages
    data       adapters            images, labels and shards; LoRA pairs and their files
    storage                        folders and S3 buckets
    config, seeding, revision, ... modules without dependencies on the packages above
    errors                         the error classes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraseg.adapters.adapter import Adapter
    from loraseg.adapters.peft_io import load_adapter
    from loraseg.client.asynchronous import AsyncClient
    from loraseg.client.synchronous import Client
    from loraseg.data.labels import LabelSpace
    from loraseg.data.readers.opening import open_dataset
    from loraseg.data.shards.torch_stream import ShardStream
    from loraseg.data.split_dataset import SplitDataset
    from loraseg.errors import LorasegError
    from loraseg.fuse.concat import concat_lora
    from loraseg.fuse.weights import mixing_weights
    from loraseg.inference.generation import load_generator
    from loraseg.inference.loading import load_segmenter
    from loraseg.inference.segmenter import Segmenter
    from loraseg.library.catalog import Library
    from loraseg.train.adapter_folder import train_adapter

__all__ = [
    "Adapter",
    "AsyncClient",
    "Client",
    "LabelSpace",
    "Library",
    "LorasegError",
    "Segmenter",
    "ShardStream",
    "SplitDataset",
    "concat_lora",
    "load_adapter",
    "load_generator",
    "load_segmenter",
    "mixing_weights",
    "open_dataset",
    "train_adapter",
]

_MODULES = {
    "Adapter": "loraseg.adapters.adapter",
    "AsyncClient": "loraseg.client.asynchronous",
    "Client": "loraseg.client.synchronous",
    "LabelSpace": "loraseg.data.labels",
    "Library": "loraseg.library.catalog",
    "LorasegError": "loraseg.errors",
    "Segmenter": "loraseg.inference.segmenter",
    "ShardStream": "loraseg.data.shards.torch_stream",
    "SplitDataset": "loraseg.data.split_dataset",
    "concat_lora": "loraseg.fuse.concat",
    "load_adapter": "loraseg.adapters.peft_io",
    "load_generator": "loraseg.inference.generation",
    "load_segmenter": "loraseg.inference.loading",
    "mixing_weights": "loraseg.fuse.weights",
    "open_dataset": "loraseg.data.readers.opening",
    "train_adapter": "loraseg.train.adapter_folder",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
