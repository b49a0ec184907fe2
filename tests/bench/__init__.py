"""Benchmarks as ratios within one process: ``python -m tests.bench NAME`` prints JSON lines."""

import os

# NumPy's BLAS reads this when it is loaded; PyTorch and faiss have settings of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from loraseg.compat import prepare_torchvision

prepare_torchvision()  # before peft, which imports torchvision
