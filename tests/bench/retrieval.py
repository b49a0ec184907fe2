"""Exact retrieval against bare matrix products, faiss and SemLA's Python loop.

The bare product of a batch, and the single pass of one query, are the fastest of NumPy and
PyTorch in either order of the factors. The ids are compared with those in float64.
"""

from collections.abc import Callable

import numpy as np
import torch

from loraseg.library.nearest import CentroidIndex
from loraseg.seeding import numpy_generator
from tests.bench.harness import Times, interleave, ratio, setting

COUNT, DIMENSIONS, FEWER_DIMENSIONS, BATCH, K = 100_000, 768, 512, 32, 5


def run() -> dict[str, object]:
    threads = torch.get_num_threads()
    try:
        faiss, absence = _import_faiss()
        torch.set_num_threads(1)
        rows, queries = _random(COUNT, DIMENSIONS)
        times = _time_large(rows, queries, faiss)
        same = {
            "random": _same_ids(rows, queries),
            "clustered": _same_ids(*_clustered()),
            "ties": _same_ids(*_tied()),
        }
        fewer = _time_large(*_random(COUNT, FEWER_DIMENSIONS), faiss)
        more = {f"d{FEWER_DIMENSIONS}": {"ratios": _ratios(fewer), **_only_times(fewer)}}
        more |= {f"n{count}": _only_times(_time_small(count)) for count in (1000, 20)}
        if absence:
            more["batch32_vs_faiss_flat"] = {"left_out": absence}
        return {
            "bench": "retrieval",
            "ratios": _ratios(times),
            "checks": {"ids_equal_f64": all(same.values())},
            "setting": setting(
                times,
                centroids=COUNT,
                dimensions=DIMENSIONS,
                batch=BATCH,
                k=K,
                ids_equal_f64=same,
                **more,
            ),
        }
    finally:
        torch.set_num_threads(threads)


def _import_faiss():
    try:
        import faiss
    except ImportError as error:
        return None, f"faiss cannot be imported: {error}"
    faiss.omp_set_num_threads(1)
    return faiss, ""


def _time_large(rows, queries, faiss) -> Times:
    index, query = CentroidIndex(rows), queries[0].copy()
    many, few = torch.from_numpy(rows), torch.from_numpy(queries)
    rivals: dict[str, Callable[[], object]] = {
        "batch32": lambda: index.search(queries, K),
        "gemm_numpy": lambda: rows @ queries.T,
        "gemm_numpy_turned": lambda: queries @ rows.T,
        "gemm_torch": lambda: many @ few.T,
        "gemm_torch_turned": lambda: few @ many.T,
        "single": lambda: index.search(query, K),
        "one_pass_numpy": lambda: rows @ query,
        "one_pass_torch": lambda: many @ few[0],
    }
    if faiss:
        flat = faiss.IndexFlatL2(rows.shape[1])
        flat.add(rows)
        rivals["faiss_batch32"] = lambda: flat.search(queries, K)
        rivals["faiss_single"] = lambda: flat.search(queries[:1], K)
    return interleave(rivals, rounds=9)


def _ratios(times: Times) -> dict[str, float]:
    ratios = {
        "batch32_vs_gemm": ratio(times, "batch32", _fastest(times, "gemm")),
        "single_vs_one_pass": ratio(times, "single", _fastest(times, "one_pass")),
    }
    if "faiss_batch32" in times:
        ratios["batch32_vs_faiss_flat"] = ratio(times, "batch32", "faiss_batch32")
    return ratios


def _fastest(times: Times, prefix: str) -> str:
    return min((name for name in times if name.startswith(prefix)), key=lambda n: min(times[n]))


def _only_times(times: Times) -> dict[str, object]:
    return {"times": setting(times)["times"]}


def _time_small(count: int) -> Times:
    rows, queries = _random(count, DIMENSIONS)
    index = CentroidIndex(rows)
    domains = {f"domain {number}": row for number, row in enumerate(rows)}

    def loop(query: np.ndarray) -> list[tuple[str, float]]:
        distances = {name: np.linalg.norm(query - row) for name, row in domains.items()}
        return sorted(distances.items(), key=lambda item: item[1])[:K]

    return interleave(
        {
            "batch32": lambda: index.search(queries, K),
            "semla_loop_batch32": lambda: [loop(query) for query in queries],
            "single": lambda: index.search(queries[0], K),
            "semla_loop_single": lambda: loop(queries[0]),
        },
        rounds=50,
    )


def _same_ids(rows, queries) -> bool:
    """Compare a batch, and each single query, with all distances in float64."""
    exact = np.empty((len(queries), len(rows)))
    for start in range(0, len(rows), 500):
        block = rows[start : start + 500].astype(np.float64)
        for distances, query in zip(exact, queries.astype(np.float64), strict=True):
            distances[start : start + 500] = np.linalg.norm(block - query, axis=1)
    expected = [np.argsort(distances, kind="stable")[:K] for distances in exact]
    index = CentroidIndex(rows)
    alone = [index.search(query, K)[0] for query in queries]
    return bool((index.search(queries, K)[0] == expected).all() and np.equal(alone, expected).all())


def _random(count: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    random = numpy_generator(0, "bench", "retrieval", count, dimensions)
    rows = random.standard_normal((count, dimensions), dtype=np.float32)
    return rows, random.standard_normal((BATCH, dimensions), dtype=np.float32)


def _clustered() -> tuple[np.ndarray, np.ndarray]:
    """Return tight clusters far from the origin, like embeddings of one encoder."""
    centres, queries = _random(1000, DIMENSIONS)
    random = numpy_generator(0, "bench", "retrieval", "clustered")
    rows = np.repeat(centres + 3, COUNT // 1000, axis=0)
    rows += 0.1 * random.standard_normal(rows.shape, dtype=np.float32)
    return rows, centres[:BATCH] + 3 + 0.1 * queries


def _tied() -> tuple[np.ndarray, np.ndarray]:
    """Return a thousand different rows of integers, each a hundred times."""
    distinct, queries = _random(1000, DIMENSIONS)
    rows = np.repeat(np.round(distinct), COUNT // 1000, axis=0)
    numpy_generator(0, "bench", "retrieval", "ties").shuffle(rows)
    return rows, np.round(queries)
