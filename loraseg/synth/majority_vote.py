"""What most of several label maps say, and which pixels agree with it (methods b.5).

Counting compares every two maps, so that the number of classes is no matter. It goes by blocks of
pixels: large enough that NumPy's calls cost little beside the work, small enough for the cache.
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
    """Return the value that means "no label": 255 in uint8 maps and 65,535 in uint16 maps.

    Raises:
        DatasetError: Maps of that type are not supported.
    """
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise DatasetError(f"class ids: got {dtype}, expected uint8 or uint16")
    return int(np.iinfo(dtype).max)


def majority_vote(
    labels: ndarray, *, mask: ndarray | None = None, ties: TieBreak = "mask_first"
) -> UInt[ndarray, "h w"]:
    """Return the id that most of k maps have at each pixel: the prototype P of b.5.

    Args:
        labels: (k, h, w) uint8 or uint16, one map a voter. Every value counts as an id.
        mask: (h, w) of the same type; only ``mask_first`` looks at it.
        ties: Which of several ids with the most votes wins. With ``mask_first`` that of the mask
            if it is among them; else, where the mask has no label (:func:`ignore_value`), and
            always with ``paper``, the smallest.

    Raises:
        DatasetError: Another type or shape, or more than 256 voters.
    """
    votes, truth = _flatten_votes(labels, mask, ties)
    won = np.empty(votes.shape[1], dtype=votes.dtype)
    for part, ballot in _vote_blocks(votes):
        won[part] = ballot.count(votes[:, part], None if truth is None else truth[part])
    return won.reshape(labels.shape[1:])


def relative_filter(
    mask: ndarray, labels: ndarray, *, ties: TieBreak = "mask_first"
) -> UInt[ndarray, "k h w"]:
    """Return the mask once a voter, without its label where the voter differs from the prototype.

    The prototype is compared with each map and not with the mask: where all voters agree on a
    class, the label of the mask stays, whatever it is.

    Args:
        mask: (h, w) uint8 or uint16; pixels without a label stay so.
        labels: (k, h, w) of the same type: what the segmenter saw in each image of the mask.
        ties: As for :func:`plurality`.

    Raises:
        DatasetError: As for :func:`plurality`.
    """
    votes, _ = _flatten_votes(labels, mask, ties)
    truth = np.ascontiguousarray(mask).reshape(-1)
    marked = np.empty_like(votes)
    for part, ballot in _vote_blocks(votes):
        told, cast = truth[part], votes[:, part]
        prototype = ballot.count(cast, told if ties == "mask_first" else None)
        write_filtered_labels(
            told, np.not_equal(cast, prototype, out=ballot.differs), marked[:, part]
        )
    return marked.reshape(labels.shape)


def write_filtered_labels(
    mask: UInt[ndarray, "..."],
    differs: Bool[ndarray, "k ..."],
    out: UInt[ndarray, "k ..."],
) -> None:
    """Write the mask into each row of ``out``, the ignore value where it ``differs``."""
    # Minus one is a map of ones only: many times faster than a choice by np.where.
    np.negative(differs.view(np.uint8), out=out, dtype=out.dtype)
    np.bitwise_or(out, mask, out=out)


class _VoteCounter:
    """Counts the votes of one block; the buffers are used again for the next."""

    def __init__(self, voters: int, pixels: int, dtype: np.dtype) -> None:
        # Of equal votes the first has all that follow it. The last is followed by none.
        self.later_matches = np.zeros((voters, pixels), dtype=np.uint8)
        self.differs = np.empty((voters, pixels), dtype=bool)
        self.candidates = np.empty((voters, pixels), dtype=dtype)
        self.max_votes = np.empty(pixels, dtype=np.uint8)
        self.winner = np.empty(pixels, dtype=dtype)

    def count(
        self, cast: UInt[ndarray, "k n"], preferred: UInt[ndarray, " n"] | None
    ) -> UInt[ndarray, " n"]:
        """Return the id with the most votes: the preferred one of the tied, else the smallest."""
        for voter in range(len(cast) - 1):
            later = self.differs[voter + 1 :]
            np.equal(cast[voter + 1 :], cast[voter], out=later)
            np.add.reduce(
                later.view(np.uint8), axis=0, out=self.later_matches[voter], dtype=np.uint8
            )
        np.maximum.reduce(self.later_matches, axis=0, out=self.max_votes)
        np.not_equal(self.later_matches, self.max_votes, out=self.differs)
        np.negative(self.differs.view(np.uint8), out=self.candidates, dtype=self.candidates.dtype)
        np.bitwise_or(self.candidates, cast, out=self.candidates)
        np.minimum.reduce(self.candidates, axis=0, out=self.winner)
        if preferred is not None:
            np.equal(self.candidates, preferred, out=self.differs)
            tied = np.logical_or.reduce(self.differs, axis=0)
            # What is no candidate has the ignore value, as has a mask without a label.
            tied &= preferred != ignore_value(preferred.dtype)
            np.copyto(self.winner, preferred, where=tied)
        return self.winner


def _vote_blocks(votes: UInt[ndarray, "k n"]) -> Iterator[tuple[slice, _VoteCounter]]:
    """Cut the pixels into blocks."""
    voters, pixels = votes.shape
    ballot = _VoteCounter(voters, min(pixels, _BLOCK_PIXELS), votes.dtype)
    for start in range(0, pixels, _BLOCK_PIXELS):
        size = min(_BLOCK_PIXELS, pixels - start)
        if size < len(ballot.max_votes):
            ballot = _VoteCounter(voters, size, votes.dtype)
        yield slice(start, start + size), ballot


def _flatten_votes(
    labels: ndarray, mask: ndarray | None, ties: TieBreak
) -> tuple[UInt[ndarray, "k n"], UInt[ndarray, " n"] | None]:
    """Check the maps; return them without rows, and the mask if it decides ties."""
    ignore_value(labels.dtype)
    if labels.ndim != 3 or not 1 <= len(labels) <= MAX_VOTERS:
        raise DatasetError(f"votes: got {labels.shape}, expected 1 to {MAX_VOTERS} maps (k, h, w)")
    if mask is not None and (mask.dtype != labels.dtype or mask.shape != labels.shape[1:]):
        raise DatasetError(
            f"mask of votes: got {mask.dtype} {mask.shape}, expected {labels.dtype} "
            f"{labels.shape[1:]}"
        )
    votes = np.ascontiguousarray(labels).reshape(len(labels), -1)
    wanted = mask is not None and ties == "mask_first"
    return votes, np.ascontiguousarray(mask).reshape(-1) if wanted else None
