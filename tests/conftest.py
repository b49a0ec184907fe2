"""What every test relies on."""

import os

# Two cores: one torch thread a process leaves room for Ray workers and the S3 server.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from loraseg.compat import prepare_torchvision

prepare_torchvision()
