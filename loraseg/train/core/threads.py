"""The number of CPU threads, which decides the last bits of sums."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["fixed_threads"]


@contextmanager
def fixed_threads(count: int) -> Generator[None, None, None]:
    """Compute with ``count`` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
