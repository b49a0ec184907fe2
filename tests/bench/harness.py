"""Interleaved timing, so that drift of the machine affects all variants equally."""

import platform
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["Times", "interleave", "ratio", "setting", "single_thread"]

Times = dict[str, list[float]]


@contextmanager
def single_thread() -> Generator[None, None, None]:
    """Compute with one thread, so that CPU time does not contain waiting threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(rivals: Mapping[str, Callable[[], object]], *, rounds: int) -> Times:
    """Run every variant once per round after one warm-up; return CPU seconds by name."""
    for rival in rivals.values():
        rival()
    times: Times = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            started = time.process_time()
            rival()
            times[name].append(time.process_time() - started)
    return times


def ratio(times: Times, ours: str, other: str) -> float:
    """Return the ratio of the minima, ``ours`` over ``other``."""
    return round(min(times[ours]) / min(times[other]), 4)


def setting(times: Times, **more: object) -> dict[str, object]:
    """Return a description of the machine, and minimum and median of every variant in ms."""
    milliseconds = {
        name: {
            "min_ms": round(1e3 * min(seconds), 4),
            "median_ms": round(1e3 * statistics.median(seconds), 4),
        }
        for name, seconds in times.items()
    }
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "times": milliseconds,
        **more,
    }
