"""Clients that send requests without pause, and checks of all responses."""

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
# Errors that a fault may cause; each is documented and says when to retry.
DOCUMENTED_ERRORS = {"replica_lost", "overloaded", "not_ready", "adapters_unavailable", "deadline"}


@dataclass(frozen=True)
class LoadResponse:
    """A response for image ``image``, requested ``sent_at_s`` seconds after the start."""

    image: int
    sent_at_s: float
    latency_s: float
    status: int
    code: str | None
    body: dict


class LoadGenerator:
    """Clients that send a request as soon as the last one is answered, while the context lasts."""

    def __init__(self, endpoint, library, clients=CLIENTS):
        self._url, self._clients = endpoint.url, clients
        self._pngs = [png(image) for image in library.images]
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
        """Return the newest generation in the last responses; 0 if there is none."""
        generations = [
            response.body.get("generation")
            for response in self.responses[-50:]
            if response.status == 200
        ]
        return max(filter(None, generations), default=0)

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


def check_responses(load, library, fault_log):
    """Compare every response with the catalog and with the models in this process."""
    errors = Counter(response.code for response in load.responses if response.status != 200)
    answered = [response for response in load.responses if response.status == 200]
    report_load(load, answered, errors, fault_log)
    unknown = {code: n for code, n in errors.items() if code not in DOCUMENTED_ERRORS}
    examples = [response for response in load.responses if response.code in unknown][:3]
    assert not unknown, examples
    expected = _ExpectedResults(library)
    wrong = [
        (response, reason)
        for response in answered
        if (reason := expected.mismatch(response)) is not None
    ]
    assert not wrong, (len(wrong), wrong[0][1], wrong[0][0])
    fault_log.append(
        f"{expected.checked_count} different responses recomputed; {expected.ties} of "
        f"{expected.pixels} pixels have the other class of a tie within 1e-5"
    )


def report_load(load, answered, errors, fault_log):
    seconds = np.array([response.latency_s for response in answered])
    p50, p99 = np.percentile(seconds, [50, 99])
    fault_log.append(
        f"{len(load.responses)} requests in {load.elapsed_s:.0f} s, {len(answered)} answered "
        f"(p50 {1e3 * p50:.0f}, p99 {1e3 * p99:.0f} ms), errors {dict(errors)}"
    )


class _ExpectedResults:
    """Computes the expected response once per image, generation and mix."""

    def __init__(self, library):
        self._library, self._predictor = library, Predictor(library.base)
        self._entries, self._retrievers = {}, {}
        self._mismatches = {}
        self.pixels = self.ties = 0

    @property
    def checked_count(self):
        return len(self._mismatches)

    def mismatch(self, response):
        """Return why a response is wrong; None if it is correct."""
        body = response.body
        used = tuple((a["name"], a["version"], a["digest"], a["weight"]) for a in body["adapters"])
        skipped = frozenset(adapter["name"] for adapter in body["skipped"])
        key = (response.image, body["generation"], skipped, used, body["segmentation_mask"])
        if key not in self._mismatches:
            self._mismatches[key] = self._find_mismatch(response.image, body, used, skipped)
        return self._mismatches[key]

    def _find_mismatch(self, image, body, used, skipped):
        entries, retriever = self._catalog(body["generation"])
        for name, version, digest, _ in used:
            if (entries[name].version, entries[name].digest) != (version, digest):
                return f"{name} is version {entries[name].version}, {entries[name].digest}"
        [nearest] = retriever.retrieve_batch(
            self._library.embeddings[image][None], K, TEMPERATURE, exclude=skipped
        )
        weights = {near.entry.name: near.weight for near in nearest}
        if list(weights) != [name for name, *_ in used]:
            return f"the nearest are {list(weights)}"
        if any(abs(weights[name] - weight) > 1e-6 for name, _, _, weight in used):
            return f"the weights are {weights}"
        mix = fuse([self._library.published[d] for _, _, d, _ in used], [w for *_, w in used])
        [scores] = self._predictor.predict([self._library.images[image]], CLASSES, mix)
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["segmentation_mask"]))))
        return self._compare(labels, scores.numpy())

    def _compare(self, labels, scores):
        """Allow another class only where scores tie: rounding depends on the batch."""
        best = scores.max(axis=0)
        margin = best - np.take_along_axis(scores, labels[None].astype(np.int64), axis=0)[0]
        self.pixels += labels.size
        self.ties += int((labels != label_map(torch.from_numpy(scores))).sum())
        wrong = int((margin > 1e-5).sum())
        return f"{wrong} pixels differ" if wrong else None

    def _catalog(self, generation):
        if generation not in self._entries:
            entries = self._library.library.entries(generation)
            self._entries[generation] = {entry.name: entry for entry in entries}
            self._retrievers[generation] = AdapterRetriever(entries)
        return self._entries[generation], self._retrievers[generation]
