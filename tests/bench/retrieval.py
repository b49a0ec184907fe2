"""Exact retrieval against one pass over the bytes of the centroids."""

import numpy as np

from loraseg.library.retrieve import top_k
from loraseg.seeding import numpy_generator
from tests.bench.harness import interleave, ratio, setting

COUNT, DIMENSIONS, K = 100_000, 768, 5


def run() -> dict[str, object]:
    random = numpy_generator(0, "bench", "retrieval")
    centroids = random.standard_normal((COUNT, DIMENSIONS), dtype=np.float32)
    query = random.standard_normal(DIMENSIONS).astype(np.float32)
    times = interleave(
        {"top_k": lambda: top_k(query, centroids, K), "one_pass": lambda: centroids @ query},
        rounds=7,
    )
    exact = np.linalg.norm(centroids.astype(np.float64) - query.astype(np.float64), axis=1)
    found, _ = top_k(query, centroids, K)
    return {
        "bench": "retrieval",
        "ratios": {"single_vs_one_pass": ratio(times, "top_k", "one_pass")},
        "checks": {"ids_equal_f64": bool((found == np.argsort(exact, kind="stable")[:K]).all())},
        "setting": setting(times, centroids=COUNT, dimensions=DIMENSIONS, k=K),
    }
