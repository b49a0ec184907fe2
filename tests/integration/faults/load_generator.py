"""Clients that ask without pause, what they were told, and whether it was true."""

import base64
import io
import threading
import time
from collections import Counter
from dataclasses import dataclass

import httpx2
import numpy as np
import torch
from PIL import Image

from loraseg.fuse import fuse
from loraseg.library.retrieve import AdapterRetriever
from loraseg.segment.open_vocabulary.pixel_maps import label_map
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.integration.faults.endpoint_process import TEMPERATURE, K, png
from tests.unit.tiny import CLASSES

CLIENTS = 16
# Refusals that an accident may cause; each is documented, and says when to ask again.
DOCUMENTED_ERRORS = {"replica_lost", "overloaded", "not_ready", "adapters_unavailable", "deadline"}


@dataclass(frozen=True)
class LoadResponse:
    """One answer: of image ``image``, ``sent_at_s`` seconds after the crowd began."""

    image: int
    sent_at_s: float
    latency_s: float
    status: int
    code: str | None
    body: dict


class LoadGenerator:
    """Sixteen clients, each asking as soon as it was answered, as long as the context lasts."""

    def __init__(self, endpoint, stock, clients=CLIENTS):
        self._url, self._clients = endpoint.url, clients
        self._pngs = [png(image) for image in stock.images]
        self._stop = threading.Event()
        self.responses = []

    def __enter__(self):
        self._started_at = time.monotonic()
        self._threads = [
            threading.Thread(target=self._run_client, args=(n,)) for n in range(self._clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def elapsed_s(self):
        return time.monotonic() - self._started_at

    def newest_generation(self):
        """The newest generation that an answer named."""
        named = [told.body.get("generation") for told in self.responses[-50:] if told.status == 200]
        return max(filter(None, named), default=0)

    def _run_client(self, turn):
        limits = httpx2.Limits(max_keepalive_connections=1)
        with httpx2.Client(base_url=self._url, timeout=90, limits=limits) as client:
            while not self._stop.is_set():
                self.responses.append(self._request(client, turn % len(self._pngs)))
                turn += 5

    def _request(self, client, image):
        started = time.monotonic()
        try:
            reply = client.post(
                "/v1/segment",
                params={"classes": ",".join(CLASSES)},
                content=self._pngs[image],
                headers={"Content-Type": "image/png"},
            )
            status, body = reply.status_code, reply.json()
            code = body.get("code")
            if status != 200:
                assert reply.headers["content-type"].startswith("application/problem+json")
        except (httpx2.HTTPError, ValueError, AssertionError) as error:
            status, body, code = 0, {"error": repr(error)}, type(error).__name__
        now = time.monotonic()
        return LoadResponse(image, started - self._started_at, now - started, status, code, body)


def check_responses(crowd, stock, chronicle):
    """Check every answer against the catalog and against the models in this process."""
    refusals = Counter(told.code for told in crowd.told if told.status != 200)
    answered = [told for told in crowd.told if told.status == 200]
    report_load(crowd, answered, refusals, chronicle)
    unknown = {code: n for code, n in refusals.items() if code not in DOCUMENTED_ERRORS}
    examples = [told for told in crowd.told if told.code in unknown][:3]
    assert not unknown, examples
    truth = _ExpectedResults(stock)
    wrong = [(told, why) for told in answered if (why := truth.mismatch(told)) is not None]
    assert not wrong, (len(wrong), wrong[0][1], wrong[0][0])
    chronicle.append(
        f"{truth.checked_count} different answers recomputed; {truth.ties} of {truth.pixels} "
        f"pixels, all "
        "of them ties within 1e-5, went to the other class"
    )


def report_load(crowd, answered, refusals, chronicle):
    seconds = np.array([told.seconds for told in answered])
    p50, p99 = np.percentile(seconds, [50, 99])
    chronicle.append(
        f"{len(crowd.told)} requests in {crowd.seconds:.0f} s, {len(answered)} answered "
        f"(p50 {1e3 * p50:.0f}, p99 {1e3 * p99:.0f} ms), refused {dict(refusals)}"
    )


class _ExpectedResults:
    """What the right answer is, worked out offline once for each image, generation and mix."""

    def __init__(self, stock):
        self._stock, self._predictor = stock, Predictor(stock.base)
        self._entries, self._retrievers = {}, {}
        self._verdicts = {}
        self.pixels = self.ties = 0

    @property
    def checked_count(self):
        return len(self._verdicts)

    def mismatch(self, response):
        """Why an answer is wrong; None if it is right."""
        body = response.body
        used = tuple((a["name"], a["version"], a["digest"], a["weight"]) for a in body["adapters"])
        skipped = frozenset(adapter["name"] for adapter in body["skipped"])
        key = (response.image, body["generation"], skipped, used, body["segmentation_mask"])
        if key not in self._verdicts:
            self._verdicts[key] = self._find_mismatch(response.image, body, used, skipped)
        return self._verdicts[key]

    def _find_mismatch(self, image, body, used, skipped):
        entries, retriever = self._catalog(body["generation"])
        for name, version, digest, _ in used:
            if (entries[name].version, entries[name].digest) != (version, digest):
                return f"{name} is version {entries[name].version}, {entries[name].digest}"
        [nearest] = retriever.retrieve_batch(
            self._stock.embeddings[image][None], K, TEMPERATURE, exclude=skipped
        )
        weights = {near.entry.name: near.weight for near in nearest}
        if list(weights) != [name for name, *_ in used]:
            return f"the nearest are {list(weights)}"
        if any(abs(weights[name] - weight) > 1e-6 for name, _, _, weight in used):
            return f"the weights are {weights}"
        mix = fuse([self._stock.published[d] for _, _, d, _ in used], [w for *_, w in used])
        [scores] = self._predictor.predict([self._stock.images[image]], CLASSES, mix)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["segmentation_mask"]))))
        return self._compare(shown, scores.numpy())

    def _compare(self, shown, scores):
        """A batch of other images rounds otherwise, which decides where two classes tie."""
        best = scores.max(axis=0)
        lost = best - np.take_along_axis(scores, shown[None].astype(np.int64), axis=0)[0]
        self.pixels += shown.size
        self.ties += int((shown != label_map(torch.from_numpy(scores))).sum())
        wrong = int((lost > 1e-5).sum())
        return f"{wrong} pixels differ" if wrong else None

    def _catalog(self, generation):
        if generation not in self._entries:
            entries = self._stock.library.entries(generation)
            self._entries[generation] = {entry.name: entry for entry in entries}
            self._retrievers[generation] = AdapterRetriever(entries)
        return self._entries[generation], self._retrievers[generation]
