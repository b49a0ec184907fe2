"""Random streams: a seed and a path of keys determine an independent stream.

All randomness comes from this module. A stream depends on nothing else, so results do not change
with the number of workers, the position in a batch or the order of arrival.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["derive", "numpy_generator", "torch_generator"]


def derive(seed: int, *keys: str | int) -> int:
    """Derive a 63-bit seed from ``seed`` and a path of keys.

    Keys are length-prefixed and typed before hashing, so ``("a", "b")``, ``("ab",)`` and
    ``(1,)`` against ``("1",)`` give unrelated seeds.

    Args:
        seed: Any integer; the seed that the user sets.
        keys: Purpose of the stream, for example ``("train", "fog-light", step)``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.sha256(f"seed:{int(seed)}".encode())
    for key in keys:
        payload = f"{'i' if isinstance(key, int) else 's'}{key}".encode()
        digest.update(len(payload).to_bytes(8, "little") + payload)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def numpy_generator(seed: int, *keys: str | int) -> np.random.Generator:
    """Return a numpy generator for the stream ``derive(seed, *keys)``."""
    return np.random.default_rng(derive(seed, *keys))


def torch_generator(seed: int, *keys: str | int) -> "torch.Generator":
    """Return a CPU torch generator for the stream ``derive(seed, *keys)``."""
    import torch  # imported here so that the client does not load torch

    return torch.Generator().manual_seed(derive(seed, *keys))
