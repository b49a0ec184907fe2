"""Exponential backoff with jitter."""

import time

from loraseg import seeding

__all__ = ["backoff_s"]


def backoff_s(attempt: int, initial_s: float, max_s: float) -> float:
    """Return the seconds to wait after attempt ``attempt`` (from 0).

    Uniform in [0, min(max_s, initial_s * 2**attempt)], so that clients that failed together do not
    retry together.
    """
    bound = min(max_s, initial_s * 2 ** min(attempt, 16))
    # Not seeded: every process, thread and machine needs another stream.
    return float(seeding.numpy_generator(time.time_ns(), "pause", attempt).uniform(0.0, bound))
