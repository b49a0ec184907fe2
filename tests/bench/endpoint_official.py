"""CPU time of the API in one process against SemLA's official procedure, ViT-B/16 and ViT-L/14.

Random weights at real sizes: CAT-Seg at ViT-B/16@384, ViT-L/14@224 as index encoder, 20
adapters of rank 8, K = 5, 19 classes, one crop. A batch of 8 images of 512 x 512, each with its
own mix, passes the API (HTTP, PNG decoding, embedding, retrieval, fusion, segmentation, PNG
encoding); two of them, one by one, pass the official procedure, which gets decoded images.

``compatible``: attention adapters of CLIP are inert and text features of the first image are kept,
as in the official code. ``correct``: they are active, and every image has its own adapted text.
"""

import asyncio
import base64
import gc
import io
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import torch
from PIL import Image

from loraseg.adapters import pack
from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import ClipEncoder, Preprocessing
from loraseg.compat import prepare_torchvision
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.disk_cache import AdapterDiskCache
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.runner import SegmentRunner
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.snapshot import AdapterFilter
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library.catalog import Library
from loraseg.seeding import numpy_generator
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.serving.config import Limits, ServiceConfig
from loraseg.serving.http_api.app import build_api
from loraseg.serving.local_engine import LocalEngine
from loraseg.storage import open_store
from tests.bench.harness import Times, interleave
from tests.bench.large_library import entries, publish_catalog
from tests.bench.official_semla import OfficialSemla
from tests.bench.partial_result import PartialResult
from tests.bench.random_adapters import random_adapter

__all__ = ["measure"]

ADAPTERS, K, RANK, SIDE, IMAGES, RIVAL_IMAGES, ROUNDS = 20, 5, 8, 512, 8, 2, 2
# Distances of random features are large; with this temperature all five weights matter.
TEMPERATURE = 0.05
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)


def measure(root: Path) -> PartialResult:
    """Measure both modes; takes about five minutes and 6 GB."""
    encoder, times = _encoder(), Times()
    ratios: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for mode, name in (("compatible", "vs_official"), ("correct", "vs_official_correct")):
        with _rivals(root / mode, encoder, mode) as (official, engine):
            found, agreement[mode] = _compare(official, engine, mode)
        times |= found
        ours, theirs = (min(times[f"{rival}_{mode}"]) for rival in ("api", "official"))
        ratios[name] = round((ours / IMAGES) / (theirs / RIVAL_IMAGES), 4)
        gc.collect()
    return PartialResult(
        ratios=ratios,
        checks={"agrees_with_official": min(agreement.values()) >= 0.999},
        times=times,
        setting={
            "official": f"ViT-B/16@384, ViT-L/14@224, {ADAPTERS} adapters, K {K}, rank {RANK}",
            "official_images": {"api": IMAGES, "official": RIVAL_IMAGES, "side": SIDE},
            "same_pixels_as_official": agreement,
        },
    )


def _compare(official: OfficialSemla, engine: LocalEngine, mode: str) -> tuple[Times, float]:
    """Return the CPU times of both procedures, and the share of pixels with equal classes."""
    images = _pictures()
    pngs = [_png(image) for image in images]
    api = build_api(engine, _config("file:///elsewhere"))
    masks: dict[str, list[np.ndarray]] = {}

    def ours() -> None:
        masks["api"] = asyncio.run(_through_api(api, pngs))

    def theirs() -> None:
        stale = mode == "compatible"
        some = images[:RIVAL_IMAGES]
        masks["official"] = [official.segment(i, CLASSES, stale_text=stale) for i in some]

    times = interleave({f"api_{mode}": ours, f"official_{mode}": theirs}, rounds=ROUNDS)
    pairs = zip(masks["api"], masks["official"], strict=False)
    return times, round(float(np.mean([np.mean(a == b) for a, b in pairs])), 6)


@contextmanager
def _rivals(
    root: Path, encoder: ClipEncoder, mode: str
) -> Generator[tuple[OfficialSemla, LocalEngine], None, None]:
    base = _base("inert" if mode == "compatible" else "active")
    adapters = [random_adapter(base.model, number, rank=RANK) for number in range(ADAPTERS)]
    known = np.concatenate([encoder.encode_images([image]) for image in _pictures("known")])
    published = entries(known, ADAPTERS, base_digest=base.digest, encoder_id=encoder.encoder_id)
    folder = AdapterDiskCache(root / "packed")
    for adapter, entry in zip(adapters, published, strict=True):
        folder.put(replace(pack(adapter), digest=entry.digest))
    centroids = [entry.card.centroids[0].vector for entry in published]
    official = OfficialSemla(base, encoder, adapters, centroids, k=K, temperature=TEMPERATURE)
    uri = publish_catalog(root / "library", published)
    with _engine(base, encoder, uri, folder, stale=mode == "compatible") as engine:
        yield official, engine


@contextmanager
def _engine(
    base: SegmentationBase, encoder: ClipEncoder, uri: str, folder: AdapterDiskCache, *, stale: bool
) -> Generator[LocalEngine, None, None]:
    library = Library(open_store(uri))
    attention = base.model.config.clip_attention_lora
    taste = AdapterFilter(
        base_digest=base.digest, encoder_id=encoder.encoder_id, attention=attention
    )
    live = LibraryWatcher(library, name="main", adapter_filter=taste, poll_s=60.0).start()
    cache = AdapterCache(AdapterLoader({"main": library}, base, folder))
    predictor = Predictor(base, text_cache="first_image" if stale else "per_adapter")
    runner = SegmentRunner(predictor, cache)
    retrieval = RetrievalStage(encoder, {"main": live})
    config = _config(uri)
    stage = SegmentationStage(ModelVariants(config), cache)
    stage.runner = lambda attention=None: runner  # with its own text cache
    with LocalEngine(config, retrieval, stage) as engine:
        assert engine.wait_until_ready(60)
        yield engine


def _config(uri: str) -> ServiceConfig:
    limits = Limits(request_timeout_s=900.0)
    return ServiceConfig(
        libraries={"main": uri}, k=K, temperature=TEMPERATURE, batch=IMAGES, limits=limits
    )


async def _through_api(api: object, pngs: Sequence[bytes]) -> list[np.ndarray]:
    transport = httpx2.ASGITransport(app=api)
    files = [("images", (f"{n}.png", png, "image/png")) for n, png in enumerate(pngs)]
    fields = {"classes": json.dumps(CLASSES), "tiling": "never", "timeout_s": "600"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://bench") as client:
        reply = await client.post("/v1/segment/batch", files=files, data=fields, timeout=600)
    reply.raise_for_status()
    lines = [json.loads(line) for line in reply.text.splitlines()]
    masks = {line["index"]: line["segmentation_mask"] for line in lines if "index" in line}
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(masks[n])))) for n in range(len(pngs))
    ]


def _base(attention: str) -> SegmentationBase:
    torch.manual_seed(0)
    config = CATSegConfig(clip_attention_lora=attention)
    model = CATSeg(config).eval().requires_grad_(False)
    tokenizer = BpeTokenizer(config.context_length)
    return SegmentationBase(name="bench", digest="ab" * 32, model=model, tokenizer=tokenizer)


def _encoder() -> ClipEncoder:
    prepare_torchvision()
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model("ViT-L-14", pretrained=None)
    del model.transformer  # the text side is not used
    tokenizer = BpeTokenizer(77)
    return ClipEncoder(
        model, tokenizer, Preprocessing(224), name="bench", digest="cd" * 32, batch_size=8
    )


def _pictures(key: str = "pictures") -> list[np.ndarray]:
    random = numpy_generator(0, "bench", key)
    small = random.integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(x).resize((SIDE, SIDE))) for x in small]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
