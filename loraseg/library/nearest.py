"""Exact nearest rows of a matrix: one float32 pass narrows down, float64 decides."""

from collections.abc import Iterator

import numpy as np
import torch

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.tensor_types import Bool, Float, Int, Tensor, ndarray

__all__ = ["CentroidIndex"]

# The product is fastest with the rows as its rows, in blocks whose scores stay in the cache; for
# two to fifteen queries with the queries as its rows, in blocks that do so themselves.
_BLOCK_ROWS_ONE_QUERY = 2**14
_BLOCK_ROWS_FEW_QUERIES = 512
_BLOCK_ROWS_MANY_QUERIES = 2048
_MANY_QUERIES = 16
# More queries at once than this no longer make the matrix product cheaper per query.
_QUERY_BATCH = 128
# Up to this number of rows, comparing all in float64 is as fast as the two passes.
_BRUTE_FORCE_ROWS = 24
_MAX_PENDING_PAIRS = 2**16
_EXACT_BLOCK_VALUES = 2**16

_UNIT_ROUNDOFF = 2.0**-24  # half the distance from 1 to the next float32
_TINY = float(np.finfo(np.float32).tiny)
# With squares up to the first no score, nor a part of its sum, is above the second.
_MAX_SQUARE = 1e36
_SCORE_LIMIT = 1e37


class CentroidIndex:
    """Finds the rows nearest to a query by Euclidean distance, exactly.

    With the mean m of all rows, x = c - m and y = q - m, a row c is as near to the query q as
    ``s = |x|^2 - 2 x y`` is small. One pass over x in float32 computes s, block by block; the few
    rows whose s lies within the rounding error of the best are compared as ``|c - q|`` in float64.
    Taking the mean off keeps that error small when all rows lie far from the origin.

    Why no true neighbour is lost: a float32 sum of d products and one more term, in any order, is
    off by at most ``g (|x|^2 + 2 |x| |y|) <= g (2 |x|^2 + |y|^2)`` with g = t u / (1 - t u),
    u = 2^-24 and t = d + 1, plus 5 for rounding x, y and |x|^2. So with ``|x|^2 (1 - 2 g)`` in
    place of ``|x|^2`` the computed s is at most the true one plus ``g |y|^2``.

    Memory: the rows as given (not copied if contiguous), a float32 copy and 12 bytes per row. A
    search takes 5 bytes per row, a few MiB for any n and q, and k results per query; no (q, n)
    array is formed.
    """

    def __init__(self, rows: Float[ndarray, "n d"]) -> None:
        """Prepare float32 or float64 rows; do not change them afterwards.

        Raises:
            AdapterMismatchError: They are not a matrix of such numbers with a row and a column.
            StageError: A component is not finite.
        """
        if rows.ndim != 2 or rows.size == 0 or rows.dtype.name not in ("float32", "float64"):
            raise AdapterMismatchError(
                f"centroids of shape {rows.shape} and type {rows.dtype}: "
                "expected (n, d), n and d at least 1, in float32 or float64"
            )
        self._rows = np.ascontiguousarray(rows)
        count, size = rows.shape
        terms = (size + 8) * _UNIT_ROUNDOFF
        self._error = terms / (1 - terms)
        self._squares = np.empty(count, dtype=np.float64)
        # NumPy's memory comes in huge pages where Linux has them, PyTorch's does not.
        scan = np.empty((count, size), dtype=np.float32)
        self._scan = torch.from_numpy(scan)
        # What is too large for these formats is found below and then never used.
        with np.errstate(over="ignore", invalid="ignore"):
            self._origin = self._rows.mean(axis=0, dtype=np.float64)
            for some in _blocks(count, max(1, _EXACT_BLOCK_VALUES // size)):
                if not np.isfinite(self._rows[some]).all():
                    raise StageError("centroids: a component is not finite")
                centred = self._rows[some] - self._origin
                scan[some] = centred
                self._squares[some] = np.einsum("nd,nd->n", centred, centred)
            bias = self._squares * (1 - 2 * self._error)
            self._bias = torch.from_numpy(bias.astype(np.float32))
        self._max_square = float(self._squares.max())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of the rows."""
        return self._rows.shape[0], self._rows.shape[1]

    def search(
        self, queries: ndarray, k: int, *, excluded: Int[ndarray, " x"] | None = None
    ) -> tuple[Int[ndarray, "*q found"], Float[ndarray, "*q found"]]:
        """Find the k nearest rows of every query; equal distances go to the lower row.

        The rows found are those of ``argsort(norm(rows - query, axis=1), kind="stable")`` in
        float64, always. One pass over the matrix serves all queries. Full speed needs rows that
        are not all equally far from a query: ties cost one float64 comparison each.

        Args:
            queries: (d,) or (q, d) floats.
            k: How many.
            excluded: Rows to leave out; repeats do no harm.

        Returns:
            Rows (int64) and float64 distances, ascending, (found,) or (q, found) each;
            ``k`` is k or the number of rows left, whichever is smaller.

        Raises:
            ConfigError: ``k`` is below 1.
            AdapterMismatchError: The queries have other dimensions than the rows.
            StageError: A query is not finite.
        """
        if k < 1:
            raise ConfigError(f"k: got {k}, expected at least 1")
        exact = self._to_query_matrix(queries)
        allowed = np.ones(self.shape[0], dtype=bool)
        if excluded is not None:
            allowed[excluded] = False
        found = min(k, int(np.count_nonzero(allowed)))
        rows = np.empty((len(exact), found), dtype=np.int64)
        distances = np.empty((len(exact), found), dtype=np.float64)
        for some in _blocks(len(exact), _QUERY_BATCH) if found else ():
            rows[some], distances[some] = self._search(exact[some], found, allowed)
        shape = (*queries.shape[:-1], found)
        return rows.reshape(shape), distances.reshape(shape)

    def distances(self, query: Float[ndarray, " d"]) -> Float[ndarray, " n"]:
        """Return the float64 distance of every row, the very numbers that ``search`` returns.

        Raises:
            AdapterMismatchError: The query has other dimensions than the rows.
            StageError: The query is not finite.
        """
        exact = self._to_query_matrix(query)[0]
        step = max(1, _EXACT_BLOCK_VALUES // exact.size)
        blocks = _blocks(len(self._rows), step)
        return np.concatenate([_norms(self._rows[some] - exact) for some in blocks])

    def _to_query_matrix(self, queries: ndarray) -> Float[ndarray, "q d"]:
        if queries.ndim not in (1, 2) or queries.shape[-1] != self.shape[1]:
            raise AdapterMismatchError(
                f"embedding of shape {queries.shape} against centroids of shape {self.shape}: "
                "expected (d,) or (q, d), and (n, d)"
            )
        exact = np.atleast_2d(queries).astype(np.float64)
        if not np.isfinite(exact).all():
            raise StageError("embedding: a component is not finite")
        return exact

    def _search(
        self, queries: Float[ndarray, "q d"], k: int, allowed: Bool[ndarray, " n"]
    ) -> tuple[Int[ndarray, "q found"], Float[ndarray, "q found"]]:
        with np.errstate(over="ignore", invalid="ignore"):
            centred = queries - self._origin
            squares = np.einsum("qd,qd->q", centred, centred)
        # Not "greater": the sum may be NaN.
        too_large = not self._max_square + squares.max() <= _MAX_SQUARE
        if too_large or np.count_nonzero(allowed) <= max(k, _BRUTE_FORCE_ROWS):
            return self._compare_all(queries, k, allowed)
        bias = self._bias
        if not allowed.all():
            # No sum with infinity is below any limit.
            bias = bias.masked_fill(torch.from_numpy(~allowed), torch.inf)
        nearest = _TopK(self._rows, queries, k)
        limits = _ScoreBounds(squares, k, self._error, self._underflow_bound(squares))
        doubled = torch.from_numpy((-2 * centred).astype(np.float32))
        due = 0
        for some, scores in self._scores(doubled, bias):
            close = scores <= limits.values
            if np.count_nonzero(close) > 2 * k * len(squares) + 64:
                limits.tighten(scores, self._squares[some])
                close = scores <= limits.values
            nearest.add(close, some.start)
            # Ever rarer, as a new limit helps less and less: k new rows a doubling, on average.
            if some.stop >= due:
                limits.lower(nearest.measure_pending())
                due = 2 * some.stop
        return nearest.result()

    def _compare_all(
        self, queries: Float[ndarray, "q d"], k: int, allowed: Bool[ndarray, " n"]
    ) -> tuple[Int[ndarray, "q found"], Float[ndarray, "q found"]]:
        left = np.flatnonzero(allowed)
        rows = np.empty((len(queries), k), dtype=np.int64)
        distances = np.empty((len(queries), k), dtype=np.float64)
        for index, query in enumerate(queries):
            every = self.distances(query)[left]
            order = np.argsort(every, kind="stable")[:k]
            rows[index], distances[index] = left[order], every[order]
        return rows, distances

    def _underflow_bound(self, squares: Float[ndarray, " q"]) -> Float[ndarray, " q"]:
        """Bound what flushing products and components near float32's smallest to zero changes."""
        return 8 * self.shape[1] * _TINY * (1 + np.sqrt(self._max_square) + np.sqrt(squares))

    def _scores(self, doubled: Tensor, bias: Tensor) -> Iterator[tuple[slice, ndarray]]:
        """Yield rows and their (rows, q) float32 scores."""
        count = len(doubled)
        # For one vector NumPy is the faster; for many PyTorch, if it is to compute in float32.
        use_torch = count > 1 and _torch_is_precise()
        few = _BLOCK_ROWS_FEW_QUERIES if count < _MANY_QUERIES else _BLOCK_ROWS_MANY_QUERIES
        step = _BLOCK_ROWS_ONE_QUERY if count == 1 else few
        for some in _blocks(len(bias), step):
            block = self._scan[some]
            if use_torch and count < _MANY_QUERIES:
                scores = torch.addmm(bias[some], doubled, block.T).numpy().T
            else:
                scores = (
                    torch.mm(block, doubled.T).numpy()
                    if use_torch
                    else block.numpy() @ doubled.numpy().T
                )
                scores += bias[some, None].numpy()
            yield some, scores


class _ScoreBounds:
    """Scores above which a row is certainly not among the k nearest, one a query.

    A row at the true distance D has a computed score of at most ``D^2 - (1 - g) |y|^2``.
    """

    def __init__(
        self, squares: Float[ndarray, " q"], k: int, error: float, slack: Float[ndarray, " q"]
    ) -> None:
        self._squares, self._k, self._error, self._underflow = squares, k, error, slack
        self.values = np.full(len(squares), _SCORE_LIMIT, dtype=np.float32)

    def lower(self, reach: Float[ndarray, " q"]) -> None:
        """Use that k rows lie within ``reach``; infinite if they are unknown."""
        # The factor (1 + g) covers the rounding of the float64 distances as well.
        limits = (1 + self._error) * reach**2 - (1 - self._error) * self._squares + self._underflow
        above = np.nextafter(
            np.minimum(limits, _SCORE_LIMIT).astype(np.float32), np.float32(np.inf)
        )
        np.minimum(self.values, above, out=self.values)

    def tighten(self, scores: Float[ndarray, "b q"], squares: Float[ndarray, " b"]) -> None:
        """Use that k of the rows with these scores lie within a distance that follows from them."""
        if len(scores) < self._k:
            return
        upper = scores.T + 4 * self._error * squares
        kth = np.partition(upper, self._k - 1, axis=1)[:, self._k - 1]
        reach = np.maximum(kth + (1 + self._error) * self._squares + self._underflow, 0)
        self.lower(np.sqrt(reach))


class _TopK:
    """The nearest rows so far of some queries, by distances in float64."""

    def __init__(self, rows: Float[ndarray, "n d"], queries: Float[ndarray, "q d"], k: int) -> None:
        self._rows, self._queries, self._k = rows, queries, k
        # Pairs of query and row, by query, then distance, then row; up to ``found`` a query.
        self._owners = np.empty(0, dtype=np.int64)
        self._members = np.empty(0, dtype=np.int64)
        self._distances = np.empty(0, dtype=np.float64)
        self._pending: list[tuple[ndarray, ndarray]] = []
        self._pending_count = 0

    def add(self, mask: ndarray, start: int) -> None:
        """Add the pairs that are true in ``mask`` (rows from ``start`` on, q)."""
        pairs = np.flatnonzero(mask)
        if pairs.size == 0:
            return
        members, owners = np.divmod(pairs, mask.shape[1])
        self._pending.append((owners, members + start))
        self._pending_count += pairs.size
        if self._pending_count > max(_MAX_PENDING_PAIRS, self._owners.size):
            self.measure_pending()

    def measure_pending(self) -> Float[ndarray, " q"]:
        """Measure the pairs that wait; return the distance of the last row kept, of every query.

        It is infinite for a query that has not found all its rows yet.
        """
        if self._pending:
            owners, members = (np.concatenate(side) for side in zip(*self._pending, strict=True))
            self._pending, self._pending_count = [], 0
            self._keep_nearest(
                np.concatenate([self._owners, owners]),
                np.concatenate([self._members, members]),
                np.concatenate([self._distances, self._distances_of(owners, members)]),
            )
        ends = np.searchsorted(self._owners, np.arange(len(self._queries)), side="right")
        full = np.diff(ends, prepend=0) == self._k
        reach = np.full(len(full), np.inf)
        reach[full] = self._distances[ends[full] - 1]
        return reach

    def result(self) -> tuple[Int[ndarray, "q found"], Float[ndarray, "q found"]]:
        """Return rows and distances, ascending."""
        self.measure_pending()
        shape = (len(self._queries), self._k)
        return self._members.reshape(shape), self._distances.reshape(shape)

    def _keep_nearest(self, owners: ndarray, members: ndarray, distances: ndarray) -> None:
        order = np.lexsort((members, distances, owners))
        owners = owners[order]
        firsts = np.searchsorted(owners, np.arange(len(self._queries)))
        kept = np.arange(owners.size) - firsts[owners] < self._k
        self._owners = owners[kept]
        self._members, self._distances = members[order[kept]], distances[order[kept]]

    def _distances_of(self, owners: ndarray, members: ndarray) -> Float[ndarray, " p"]:
        step = max(1, _EXACT_BLOCK_VALUES // self._queries.shape[1])
        blocks = _blocks(owners.size, step)
        return np.concatenate(
            [_norms(self._rows[members[some]] - self._queries[owners[some]]) for some in blocks]
        )


def _norms(differences: Float[ndarray, "p d"]) -> Float[ndarray, " p"]:
    """Return the same as ``numpy.linalg.norm``, in the memory of the differences."""
    # Beyond 1e154 a square has no float64 value and the distance is infinite.
    with np.errstate(over="ignore"):
        return np.sqrt(np.square(differences, out=differences).sum(axis=1))


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _torch_is_precise() -> bool:
    """Return whether PyTorch multiplies float32 matrices in float32 and not, say, in bfloat16."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # Set by backend, so that there is no one answer.
        return False
    return precision == "highest" and not torch.is_autocast_enabled("cpu")
