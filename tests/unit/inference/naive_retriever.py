"""A retriever in plain Python: SemLA's distance-based adapter weighting."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entry:
    name: str
    digest: str
    version: int = 1


@dataclass(frozen=True)
class NaiveMatch:
    entry: Entry
    distance: float
    weight: float


def softmax_of_inverse(distances, temperature):
    scores = [math.exp(1 / (d * temperature)) for d in distances]
    return [score / sum(scores) for score in scores]


class NaiveRetriever:
    """Records the number of queries of each search."""

    def __init__(self, entries, centroids):
        self._known = list(zip(entries, centroids, strict=True))
        self.searches = []

    def retrieve_batch(self, embeddings, k, temperature, exclude=()):
        self.searches.append(len(embeddings))
        return [self._retrieve(e, k, temperature, exclude) for e in embeddings]

    def distances(self, embeddings):
        return np.array([[np.linalg.norm(e - c) for _, c in self._known] for e in embeddings])

    def _retrieve(self, embedding, k, temperature, exclude):
        known = [(float(np.linalg.norm(embedding - c)), e) for e, c in self._known]
        nearest = sorted((d, e.name, e) for d, e in known if e.name not in exclude)[:k]
        weights = softmax_of_inverse([d for d, _, _ in nearest], temperature)
        return [NaiveMatch(e, d, w) for (d, _, e), w in zip(nearest, weights, strict=True)]
