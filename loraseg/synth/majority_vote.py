"""Majority vote over several label maps, and MatchMask's relative filter.

Counting compares each pair of maps, so its cost does not depend on the number of classes. It runs
in blocks of pixels, large enough to amortise NumPy's call overhead and small enough for the cache.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from loraseg.errors import DatasetError
from loraseg.tensor_types import Bool, UInt, ndarray

__all__ = [
    "MAX_VOTERS",
    "TieBreak",
    "ignore_value",
    "majority_vote",
    "relative_filter",
    "write_filtered_labels",
]

TieBreak = Literal["mask_first", "paper"]

MAX_VOTERS = 256
_BLOCK_PIXELS = 1 << 16


def ignore_value(dtype: np.dtype) -> int:
    """Return the value of pixels without a label: 255 in uint8 maps, 65,535 in uint16 maps.

    Raises:
        DatasetError: Maps of that dtype are not supported.
    """
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise DatasetError(f"class ids: got {dtype}, expected uint8 or uint16")
    return int(np.iinfo(dtype).max)


def majority_vote(
    labels: ndarray, *, mask: ndarray | None = None, ties: TieBreak = "mask_first"
) -> UInt[ndarray, "h w"]:
    """Return the most frequent id of k maps at each pixel: the prototype of relative filtering.

    ``P(i, j) = argmax_c sum_k [PM_k(i, j) = c]`` with the pseudo-labels PM_k of the k images of a
    mask (MatchMask, CVPR 2026, "Relative Filtering"). The paper does not define ties; ``paper``
    takes the argmax literally.

    Args:
        labels: (k, h, w) uint8 or uint16, one map per voter. Every value counts as an id.
        mask: (h, w) of the same dtype; only used by ``mask_first``.
        ties: Which of several ids with the most votes wins. ``mask_first``: the id of the mask if
            it is among them, otherwise the smallest, as for pixels where the mask has no label
            (:func:`ignore_value`). ``paper``: always the smallest.

    Raises:
        DatasetError: A dtype or shape is not as above, or there are more than 256 voters.
    """
    votes, preferred = _flatten_votes(labels, mask, ties)
    winners = np.empty(votes.shape[1], dtype=votes.dtype)
    for block, counter in _vote_blocks(votes):
        winners[block] = counter.count(
            votes[:, block], None if preferred is None else preferred[block]
        )
    return winners.reshape(labels.shape[1:])


def relative_filter(
    mask: ndarray, labels: ndarray, *, ties: TieBreak = "mask_first"
) -> UInt[ndarray, "k h w"]:
    """Return one copy of the mask per voter, ignored where the voter differs from the prototype.

    ``label_k(i, j) = SM(i, j) if PM_k(i, j) = P(i, j), else ignore`` for the mask SM and the
    prototype P of :func:`majority_vote` (MatchMask, CVPR 2026, "Relative Filtering"). The maps are
    compared with the prototype and not with the mask: where all voters agree on another class than
    the mask, the label of the mask is kept.

    Args:
        mask: SM, (h, w) uint8 or uint16; pixels without a label stay without.
        labels: PM, (k, h, w) of the same dtype: the segmenter's classes of each image of the mask.
        ties: As for :func:`majority_vote`.

    Raises:
        DatasetError: As for :func:`majority_vote`.
    """
    votes, _ = _flatten_votes(labels, mask, ties)
    flat_mask = np.ascontiguousarray(mask).reshape(-1)
    filtered = np.empty_like(votes)
    for block, counter in _vote_blocks(votes):
        mask_block, vote_block = flat_mask[block], votes[:, block]
        prototype = counter.count(vote_block, mask_block if ties == "mask_first" else None)
        differs = np.not_equal(vote_block, prototype, out=counter.differs)
        write_filtered_labels(mask_block, differs, filtered[:, block])
    return filtered.reshape(labels.shape)


def write_filtered_labels(
    mask: UInt[ndarray, "..."],
    differs: Bool[ndarray, "k ..."],
    out: UInt[ndarray, "k ..."],
) -> None:
    """Write the mask into each row of ``out``, and the ignore value where ``differs`` is True."""
    # The negative of True has all bits set: many times faster than np.where.
    np.negative(differs.view(np.uint8), out=out, dtype=out.dtype)
    np.bitwise_or(out, mask, out=out)


class _VoteCounter:
    """Counts the votes of one block of pixels; its buffers are reused for the next block."""

    def __init__(self, voters: int, pixels: int, dtype: np.dtype) -> None:
        # Number of later voters with the same vote: the first of equal votes has the largest.
        self.later_matches = np.zeros((voters, pixels), dtype=np.uint8)
        self.differs = np.empty((voters, pixels), dtype=bool)
        self.candidates = np.empty((voters, pixels), dtype=dtype)
        self.max_votes = np.empty(pixels, dtype=np.uint8)
        self.winner = np.empty(pixels, dtype=dtype)

    def count(
        self, votes: UInt[ndarray, "k n"], preferred: UInt[ndarray, " n"] | None
    ) -> UInt[ndarray, " n"]:
        """Return the id with the most votes; of tied ids the preferred one, else the smallest."""
        for voter in range(len(votes) - 1):
            later = self.differs[voter + 1 :]
            np.equal(votes[voter + 1 :], votes[voter], out=later)
            np.add.reduce(
                later.view(np.uint8), axis=0, out=self.later_matches[voter], dtype=np.uint8
            )
        np.maximum.reduce(self.later_matches, axis=0, out=self.max_votes)
        np.not_equal(self.later_matches, self.max_votes, out=self.differs)
        np.negative(self.differs.view(np.uint8), out=self.candidates, dtype=self.candidates.dtype)
        np.bitwise_or(self.candidates, votes, out=self.candidates)
        np.minimum.reduce(self.candidates, axis=0, out=self.winner)
        if preferred is not None:
            np.equal(self.candidates, preferred, out=self.differs)
            tied = np.logical_or.reduce(self.differs, axis=0)
            # Entries that are not candidates hold the ignore value, like an unlabelled mask.
            tied &= preferred != ignore_value(preferred.dtype)
            np.copyto(self.winner, preferred, where=tied)
        return self.winner


def _vote_blocks(votes: UInt[ndarray, "k n"]) -> Iterator[tuple[slice, _VoteCounter]]:
    """Split the pixels into blocks; yield each with a counter of its size."""
    voters, pixels = votes.shape
    counter = _VoteCounter(voters, min(pixels, _BLOCK_PIXELS), votes.dtype)
    for start in range(0, pixels, _BLOCK_PIXELS):
        size = min(_BLOCK_PIXELS, pixels - start)
        if size < len(counter.max_votes):
            counter = _VoteCounter(voters, size, votes.dtype)
        yield slice(start, start + size), counter


def _flatten_votes(
    labels: ndarray, mask: ndarray | None, ties: TieBreak
) -> tuple[UInt[ndarray, "k n"], UInt[ndarray, " n"] | None]:
    """Check the maps; return them with flattened pixels, and the mask if it decides ties."""
    ignore_value(labels.dtype)
    if labels.ndim != 3 or not 1 <= len(labels) <= MAX_VOTERS:
        raise DatasetError(f"votes: got {labels.shape}, expected 1 to {MAX_VOTERS} maps (k, h, w)")
    if mask is not None and (mask.dtype != labels.dtype or mask.shape != labels.shape[1:]):
        raise DatasetError(
            f"mask of votes: got {mask.dtype} {mask.shape}, expected {labels.dtype} "
            f"{labels.shape[1:]}"
        )
    votes = np.ascontiguousarray(labels).reshape(len(labels), -1)
    if mask is None or ties != "mask_first":
        return votes, None
    return votes, np.ascontiguousarray(mask).reshape(-1)
