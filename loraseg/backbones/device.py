"""Selection of the device that models run on."""

import torch

__all__ = ["best_device"]


def best_device() -> torch.device:
    """Return the GPU if this process can see one, otherwise the CPU.

    Ray hides GPUs that are not assigned to a task.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
