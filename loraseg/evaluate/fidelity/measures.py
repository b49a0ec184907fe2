"""Measures of the similarity of two sets of images, from their embeddings.

CMMD: Jayasumana et al., "Rethinking FID", arXiv 2401.09603, google-research/cmmd ``distance.py:
mmd``. FID: Heusel et al., arXiv 1706.08500, eq. 6. Coverage: Naeem et al., arXiv 2002.09797,
clovaai/generative-evaluation-prdc ``prdc.py: compute_prdc``.

All functions compute in float64 and in blocks; n and m embeddings never need an (n, m) matrix.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from loraseg.errors import DatasetError, StageError
from loraseg.library.nearest import CentroidIndex
from loraseg.tensor_types import Float, Int, ndarray

__all__ = [
    "CMMD_SCALE",
    "CMMD_SIGMA",
    "cmmd",
    "coverage",
    "frechet_distance",
    "knn_distances",
    "l2_normalise",
    "mean_pairwise_distance",
    "near_duplicate_threshold",
    "nearest_neighbours",
    "within_mask_distance",
]

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_NEAR_DUPLICATE_PERCENTILE = 1.0
_BLOCK = 2048


def l2_normalise(embeddings: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    """Return float64 embeddings of unit length.

    Raises:
        StageError: An embedding is not finite, or is zero.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        raise StageError(
            f"embedding {bad[0]}: length {lengths[bad[0], 0]}, expected a finite length above 0"
        )
    return rows / lengths


def cmmd(
    first: Float[ndarray, "n d"], second: Float[ndarray, "m d"], *, sigma: float = CMMD_SIGMA
) -> float:
    """Return CMMD: the squared maximum mean discrepancy of unit embeddings, times 1000.

    The kernel is ``exp(-|x - y|^2 / (2 sigma^2))``. The estimate is the biased one, which includes
    the diagonals: it is 0 for equal sets, never negative, and larger for smaller sets.

    Raises:
        DatasetError: A set is empty.
    """
    _check_counts(first, second, minimum=1)
    within = _mean_self_kernel(first, sigma) + _mean_self_kernel(second, sigma)
    across = _kernel_sum(first, second, sigma) / (len(first) * len(second))
    # Rounding may make the squared norm slightly negative.
    return CMMD_SCALE * max(0.0, within - 2 * across)


def frechet_distance(first: Float[ndarray, "n d"], second: Float[ndarray, "m d"]) -> float:
    """Return the squared Fréchet distance of normal distributions fitted to the sets.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` with means m and covariances C (divisor n - 1).
    With ``C = A A^T`` the trace of the root is the sum of the singular values of ``A1^T A2``. This
    needs no root of an unsymmetric matrix and has errors below 1e-8 even for singular covariances,
    as with fewer images than dimensions. The distance decreases with the size of the sets: compare
    sets of equal size only.

    Raises:
        DatasetError: A set has fewer than two rows.
    """
    _check_counts(first, second, minimum=2)
    (mean1, factor1), (mean2, factor2) = _moments(first), _moments(second)
    shared = float(np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum())
    spread = float(np.square(factor1).sum() + np.square(factor2).sum())
    return max(0.0, float(np.square(mean1 - mean2).sum()) + spread - 2 * shared)


def knn_distances(rows: Float[ndarray, "n d"], k: int) -> Float[ndarray, "n k"]:
    """Return the distances of every row to its k nearest other rows, ascending.

    Raises:
        DatasetError: There are at most k rows.
    """
    if len(rows) <= k:
        raise DatasetError(f"{k} nearest others: got {len(rows)} rows, expected over {k}")
    neighbours, distances = CentroidIndex(rows).search(rows, k + 1)
    # Among equal rows, a row is not always its own first neighbour, nor among the first k + 1.
    others = neighbours != np.arange(len(rows))[:, None]
    others[others.all(axis=1), k] = False
    return distances[others].reshape(len(rows), k)


def nearest_neighbours(
    queries: Float[ndarray, "q d"], rows: Float[ndarray, "n d"]
) -> tuple[Int[ndarray, " q"], Float[ndarray, " q"]]:
    """Return the index of the row nearest to every query, and its distance.

    Raises:
        DatasetError: A set is empty.
    """
    _check_counts(queries, rows, minimum=1)
    indices, distances = CentroidIndex(rows).search(queries, 1)
    return indices[:, 0], distances[:, 0]


def coverage(radii: Float[ndarray, " n"], nearest: Float[ndarray, " n"]) -> float:
    """Return the share of points with a point of the other set in their k-neighbour ball.

    Args:
        radii: Distance of every point of the first set to its k-th neighbour in that set.
        nearest: Distance of every point of the first set to the nearest point of the other set; a
            distance equal to the radius counts as inside.
    """
    return float((nearest <= radii).mean())


def near_duplicate_threshold(nearest_others: Float[ndarray, " n"]) -> float:
    """Return the distance up to which a synthetic image counts as a copy of a real one.

    It is the first percentile of the distances of real images to their nearest other real image.

    Args:
        nearest_others: Distance of every real image to its nearest other real image.
    """
    return float(np.percentile(nearest_others, _NEAR_DUPLICATE_PERCENTILE))


def mean_pairwise_distance(rows: Float[ndarray, "n d"]) -> float:
    """Return the mean of ``1 - cos`` over all pairs of different rows of unit length.

    The time is linear in the number of rows.

    Raises:
        DatasetError: There are fewer than two rows.
    """
    count = len(rows)
    if count < 2:
        raise DatasetError(f"pairwise distances: got {count} rows, expected at least 2")
    # |sum x|^2 is the sum of all cosines: each pair twice, and each row with itself.
    cosines = float(np.square(rows.sum(axis=0)).sum()) - float(np.square(rows).sum())
    return 1 - cosines / (count * (count - 1))


def within_mask_distance(
    rows: Float[ndarray, "n d"], masks: Sequence[str]
) -> tuple[float | None, int, int]:
    """Measure the diversity of images generated from one mask.

    Args:
        rows: Unit embeddings.
        masks: Id of the mask of every image.

    Returns:
        :func:`mean_pairwise_distance` of the images of a mask, averaged over the masks with at
        least two images (None without such masks); the number of these masks and of their images.
    """
    groups: dict[str, list[int]] = {}
    for row, mask in enumerate(masks):
        groups.setdefault(mask, []).append(row)
    several = [members for members in groups.values() if len(members) > 1]
    if not several:
        return None, 0, 0
    distances = [mean_pairwise_distance(rows[members]) for members in several]
    return float(np.mean(distances)), len(several), sum(map(len, several))


def _check_counts(first: ndarray, second: ndarray, *, minimum: int) -> None:
    if min(len(first), len(second)) < minimum:
        raise DatasetError(
            f"got {len(first)} and {len(second)} embeddings, expected at least {minimum} of each"
        )


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _mean_self_kernel(rows: Float[ndarray, "n d"], sigma: float) -> float:
    """Return the mean kernel over all pairs of a set; each block of pairs is computed once."""
    total = 0.0
    for indices in _blocks(len(rows)):
        block = rows[indices]
        total += _kernel_sum(block, block, sigma)
        total += 2 * _kernel_sum(block, rows[indices.stop :], sigma)
    return total / len(rows) ** 2


def _kernel_sum(first: Float[ndarray, "n d"], second: Float[ndarray, "m d"], sigma: float) -> float:
    total = 0.0
    squares1, squares2 = (np.einsum("nd,nd->n", rows, rows) for rows in (first, second))
    for block1 in _blocks(len(first)):
        for block2 in _blocks(len(second)):
            exponents = first[block1] @ second[block2].T
            exponents -= squares1[block1, None] / 2
            exponents -= squares2[block2] / 2
            exponents /= sigma**2
            total += float(np.exp(exponents, out=exponents).sum())
    return total


def _moments(
    rows: Float[ndarray, "n d"],
) -> tuple[Float[ndarray, " d"], Float[ndarray, "d r"]]:
    """Return the mean and a factor A of the covariance A A^T."""
    mean = rows.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    for indices in _blocks(len(rows)):
        centred = rows[indices] - mean
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / (len(rows) - 1))
    return mean, vectors * np.sqrt(values.clip(min=0))
