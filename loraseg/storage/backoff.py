"""How long to wait before trying again."""

import time

from loraseg import seeding

__all__ = ["backoff_s"]


def backoff_s(attempt: int, initial_s: float, max_s: float) -> float:
    """Return how long to wait after attempt ``attempt`` (from 0): exponential, bounded, jittered.

    Uniform from 0 to the bound, so that many who failed together do not return together.
    """
    bound = min(max_s, initial_s * 2 ** min(attempt, 16))
    # Processes, threads and machines need different streams; only the waiting depends on them.
    return float(seeding.numpy_generator(time.time_ns(), "pause", attempt).uniform(0.0, bound))
