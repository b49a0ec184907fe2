"""Dependence of the time per image, and of adding an adapter, on the size of the library.

The complete path on the miniature models: embed, retrieve among N centroids, map the K adapters
from disk unless they are cached, mix, segment. Every round has different images, so that most of
their adapters are not cached. K is that of the miniature's preset, and 5, which costs relatively
more on a small model than on a large one. Adapters are added at the size of ViT-B/16.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from loraseg.adapters import Adapter, PackedAdapter, pack
from loraseg.backbones.clip import load_clip
from loraseg.fuse import AdapterBank, fuse
from loraseg.inference.adapter_cache import AdapterCache, AdapterPool
from loraseg.inference.disk_cache import AdapterDiskCache
from loraseg.inference.segmenter import Segmenter
from loraseg.inference.selection import AdaptiveSettings, default_adaptive_settings
from loraseg.library import CatalogEntry
from loraseg.library.retrieve import AdapterRetriever
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.bench.harness import Times, interleave, ratio, setting, single_thread
from tests.bench.large_library import entries, scene_embeddings, scenes, write_packed_adapters
from tests.bench.random_adapters import random_adapter

FEW, MANY, RANK, BATCH, ROUNDS = 20, 10_000, 8, 8, 12
NEAREST = (default_adaptive_settings("miniature").k, 5)


def run() -> dict[str, object]:
    with single_thread(), tempfile.TemporaryDirectory() as place:
        base, encoder = load_base("miniature"), load_clip("miniature")
        batches = [scenes(f"round {number}") for number in range(ROUNDS + 2)]
        known = scene_embeddings(encoder)
        folder = AdapterDiskCache(Path(place) / "packed")
        template = pack(random_adapter(base.model, 0, rank=RANK))
        libraries = {count: entries(known, count) for count in (FEW, MANY)}
        for published in libraries.values():
            write_packed_adapters(folder, published, template)
        times: Times = {}
        loads: dict[str, int] = {}
        for k in NEAREST:
            segmenters = {
                f"{count}_k{k}": _segmenter(base, encoder, published, folder, k)
                for count, published in libraries.items()
            }
            rivals = {
                name: _segment_all(batches, segmenter.segment)
                for name, (segmenter, _) in segmenters.items()
            }
            times |= interleave(rivals, rounds=ROUNDS)
            loads |= {name: loaded["count"] for name, (_, loaded) in segmenters.items()}
        times |= _time_adding(Path(place) / "adding", known)
    return {
        "bench": "library_scale",
        "ratios": {
            "n10000_vs_n20": ratio(times, f"{MANY}_k{NEAREST[0]}", f"{FEW}_k{NEAREST[0]}"),
            "n10000_vs_n20_k5": ratio(times, f"{MANY}_k5", f"{FEW}_k5"),
            "add_1000th_vs_2nd": ratio(times, "add_1000th", "add_2nd"),
        },
        "checks": {"many_adapters_loaded": loads[f"{MANY}_k{NEAREST[0]}"] > 2 * FEW},
        "setting": setting(
            times,
            k=NEAREST,
            rank=RANK,
            images_per_round=BATCH,
            adapter_bytes=template.nbytes,
            adapters_mapped=loads,
            added="ViT-B/16, all 137 sites of CAT-Seg",
        ),
    }


def _segment_all(
    batches: list[list[np.ndarray]], segment: Callable[..., object]
) -> Callable[[], object]:
    source = iter(batches)
    return lambda: segment(next(source), ["road", "sky", "car", "person"])


def _segmenter(
    base: SegmentationBase,
    encoder: object,
    published: list[CatalogEntry],
    folder: AdapterDiskCache,
    k: int,
) -> tuple[Segmenter, dict[str, int]]:
    loaded = {"count": 0}

    def load(entry: CatalogEntry) -> PackedAdapter:
        loaded["count"] += 1
        packed = folder.get(entry.digest)
        assert packed is not None
        return replace(packed, base_digest=base.digest)

    pool = AdapterPool(published, AdapterCache(load), AdapterRetriever(published))
    settings = AdaptiveSettings(k=k, temperature=0.04)
    return Segmenter(Predictor(base), encoder, pool, settings), loaded


def _time_adding(root: Path, known: np.ndarray) -> Times:
    """Add one adapter of ViT-B/16 to 1 and to 999: pack, write, index, use once."""
    torch.manual_seed(0)
    model = CATSeg(CATSegConfig()).eval().requires_grad_(False)
    adapters = [random_adapter(model, number, rank=RANK) for number in range(2)]
    rivals: dict[str, Callable[[], object]] = {}
    for name, there in (("add_2nd", 1), ("add_1000th", 999)):
        folder, published = AdapterDiskCache(root / name), entries(known, there + 1)
        tiny = PackedAdapter(name="t", digest="0" * 64, base_digest=None, blocks={})
        for entry in published[:-1]:
            folder.put(replace(tiny, digest=entry.digest))
        rivals[name] = _adder(AdapterBank(model), folder, published, adapters)
    return interleave(rivals, rounds=9)


def _adder(
    bank: AdapterBank,
    folder: AdapterDiskCache,
    published: list[CatalogEntry],
    adapters: list[Adapter],
) -> Callable[[], object]:
    with bank.use([fuse(adapters, [0.5, 0.5])]):  # allocates the buffers
        pass
    turns = iter(range(1000))

    def add() -> None:
        turn = next(turns)
        adapter = replace(adapters[turn % 2], digest=f"{10**6 + turn:064x}")
        packed = folder.put(pack(adapter))
        AdapterRetriever(published)
        with bank.use([fuse([packed, packed], [0.5, 0.5])]):
            pass

    return add
