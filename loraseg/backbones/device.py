"""Where models run."""

import torch

__all__ = ["best_device"]


def best_device() -> torch.device:
    """Return the GPU that this process may use, else the CPU.

    Ray hides from a task the GPUs that were not set aside for it.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
