"""The endpoint as deployed (``python -m jobs.serve``) with the miniature models.

The bare engine is :class:`Segmenter` in this process, with one thread, on decoded images.
Over HTTP the same images are sent as PNG, in one batch request or by several clients; times are
wall-clock times, since the work is spread over processes, of the fastest round. The libraries
have 20 and 10,000 adapters, packed on the local disk.
"""

import base64
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

from loraseg.adapters import pack
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.disk_cache import AdapterDiskCache
from loraseg.inference.loading import load_models, load_segmenter
from loraseg.inference.segmenter import Segmenter
from tests.bench.harness import Times
from tests.bench.large_library import (
    entries,
    publish_catalog,
    scene_embeddings,
    scenes,
    write_packed_adapters,
)
from tests.bench.partial_result import PartialResult
from tests.bench.random_adapters import random_adapter

__all__ = ["measure"]

FEW, MANY, RANK, BATCH, ROUNDS = 20, 10_000, 8, 8, 12
CLIENTS, LOAD_S = (1, 4, 16), 12.0
CLASSES = ("road", "sky", "car", "person")


def measure(root: Path) -> PartialResult:
    """Measure; takes about four minutes and 6 GB of disk."""
    before = os.environ.get("LORASEG_CACHE")
    os.environ["LORASEG_CACHE"] = str(root / "cache")
    try:
        uris = _libraries(root)
        with _run_service(uris) as url, httpx2.Client(base_url=url, timeout=120) as client:
            return _measure(url, client, uris)
    finally:
        if before is None:
            del os.environ["LORASEG_CACHE"]
        else:
            os.environ["LORASEG_CACHE"] = before


def _measure(url: str, client: httpx2.Client, uris: Mapping[str, str]) -> PartialResult:
    bare = _make_segmenter(uris["few"])
    batches = [scenes(f"round {number}", BATCH) for number in range(ROUNDS + 1)]
    times, masks = _overhead(client, bare, batches)
    times |= _by_size(client, batches)
    load, shares = {}, {}
    for clients in CLIENTS:
        load[str(clients)], shares[str(clients)] = _under_load(url, clients)
    equal = _same_pixels(bare, batches[-1], masks)
    quickest = {name: min(seconds) for name, seconds in times.items()}
    return PartialResult(
        ratios={
            "http_overhead_b8": round(quickest["http_batch"] / quickest["bare_batch"], 4),
            "http_overhead_8_clients": round(
                quickest["http_8_clients"] / quickest["bare_batch"], 4
            ),
            "served_n10000_vs_n20": round(
                statistics.median(times[f"http_{MANY}"]) / statistics.median(times[f"http_{FEW}"]),
                4,
            ),
        },
        checks={"pixels_equal": equal == 1.0},
        times=times,
        setting={
            "same_pixels_as_offline": equal,
            "miniature": f"{BATCH} images of 64 x 64, K "
            "{default_adaptive_settings('miniature').k}, rank {RANK}",
            "load": load,
            "stage_shares": shares,
        },
    )


def _libraries(root: Path) -> dict[str, str]:
    models = load_models(SegmenterConfig(), None)
    known = scene_embeddings(models.encoder)
    template = pack(random_adapter(models.base.model, 0, rank=RANK))
    folder = AdapterDiskCache(root / "cache" / "packed")
    uris: dict[str, str] = {}
    for name, count in (("few", FEW), ("many", MANY)):
        digest, encoder = models.base.digest, models.encoder.encoder_id
        published = entries(known, count, base_digest=digest, encoder_id=encoder)
        write_packed_adapters(folder, published, template)
        uris[name] = publish_catalog(root / name, published)
    return uris


@contextmanager
def _run_service(uris: Mapping[str, str]) -> Generator[str, None, None]:
    command = [sys.executable, "-m", "jobs.serve", "port=0", f"batch={BATCH}"]
    command += [f"libraries.{name}={uri}" for name, uri in uris.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stdout or ():
                if line.startswith("ready: "):
                    break
            else:
                raise RuntimeError("the endpoint did not start")
            yield line.removeprefix("ready: ").strip()
        finally:
            family = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            _, stubborn = psutil.wait_procs([psutil.Process(server.pid), *family], timeout=60)
            for process in stubborn:
                process.kill()


def _make_segmenter(uri: str) -> Segmenter:
    return load_segmenter(uri)


def _overhead(
    client: httpx2.Client, bare: Segmenter, batches: Sequence[Sequence[np.ndarray]]
) -> tuple[Times, list[np.ndarray]]:
    """Alternate between the variants; each gets the images of a round once (new mixes)."""
    masks: list[np.ndarray] = []
    with ThreadPoolExecutor(BATCH) as clients:

        def together(images: Sequence[np.ndarray]) -> None:
            list(clients.map(lambda png: _post_image(client, png), [_png(i) for i in images]))

        def batch(images: Sequence[np.ndarray]) -> None:
            masks[:] = _post_batch(client, [_png(image) for image in images])

        rivals: dict[str, Callable[[Any], object]] = {
            "bare_batch": lambda images: bare.segment(images, CLASSES),
            "http_batch": batch,
            "http_8_clients": together,
        }
        return _rounds(rivals, batches), masks


def _by_size(client: httpx2.Client, batches: Sequence[Sequence[np.ndarray]]) -> Times:
    def over(library: str) -> Callable[[Any], object]:
        return lambda images: _post_batch(
            client, [_png(image) for image in images], library=library
        )

    return _rounds({f"http_{FEW}": over("few"), f"http_{MANY}": over("many")}, batches)


def _rounds(rivals: Mapping[str, Callable[[Any], object]], batches: Sequence[Any]) -> Times:
    for rival in rivals.values():
        rival(batches[0])
    times: Times = {name: [] for name in rivals}
    for number, batch in enumerate(batches[1:]):
        order = list(rivals.items())
        for name, rival in order[number % len(order) :] + order[: number % len(order)]:
            started = time.perf_counter()
            rival(batch)
            times[name].append(time.perf_counter() - started)
    return times


def _under_load(url: str, clients: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return images per second and latencies, and the share of each stage in the latency."""
    pngs = [_png(image) for number in range(8) for image in scenes(f"load {number}", BATCH)]
    seconds: list[float] = []
    stages: Counter[str] = Counter()
    until = time.perf_counter() + LOAD_S
    lock = threading.Lock()

    def visit(offset: int) -> None:
        with httpx2.Client(base_url=url, timeout=120) as client:
            turn = offset
            while time.perf_counter() < until:
                started = time.perf_counter()
                timing = _post_image(client, pngs[turn % len(pngs)])["timing_ms"]
                spent = time.perf_counter() - started
                with lock:
                    seconds.append(spent)
                    stages.update(timing)
                turn += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(visit, range(0, 5 * clients, 5)))
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    total = 1e3 * sum(seconds)
    named = {name: round(spent / total, 3) for name, spent in stages.items() if name != "total"}
    figures = {
        "images_per_s": round(len(seconds) / LOAD_S, 1),
        "p50_ms": round(1e3 * float(p50), 1),
        "p95_ms": round(1e3 * float(p95), 1),
        "p99_ms": round(1e3 * float(p99), 1),
    }
    return figures, {**named, "http": round(1 - sum(named.values()), 3)}


def _post_image(client: httpx2.Client, png: bytes, library: str = "few") -> dict[str, Any]:
    reply = client.post(
        "/v1/segment",
        params={"classes": ",".join(CLASSES), "library": library},
        content=png,
        headers={"Content-Type": "image/png"},
    )
    reply.raise_for_status()
    return reply.json()


def _post_batch(
    client: httpx2.Client, pngs: Sequence[bytes], library: str = "few"
) -> list[np.ndarray]:
    files = [("images", (f"{n}.png", png, "image/png")) for n, png in enumerate(pngs)]
    fields = {"classes": ",".join(CLASSES), "library": library}
    reply = client.post("/v1/segment/batch", files=files, data=fields)
    reply.raise_for_status()
    lines = [json.loads(line) for line in reply.text.splitlines()]
    masks = {line["index"]: line["segmentation_mask"] for line in lines if "index" in line}
    return [_labels(masks[number]) for number in range(len(pngs))]


def _labels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def _same_pixels(
    bare: Segmenter, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> float:
    """Return the share of pixels with equal labels in the batch request and in local inference."""
    offline = [bare.segment([image], CLASSES)[0].label_map for image in images]
    return round(float(np.mean([np.mean(a == b) for a, b in zip(offline, masks, strict=True)])), 6)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
