"""Sizes of the suite: a short form for every change, the full one for `make faults`."""

import os

FULL = os.environ.get("LORASEG_FAULTS") == "full"
# Seed of all random choices; printed with every test, so that a failure can be reproduced.
SEED = int(os.environ.get("LORASEG_FAULTS_SEED", "0"))

RUNS = range(5 if FULL else 1)
KILLS = 3 if FULL else 2
PUBLISHERS, ADAPTERS, READERS = (16, 25, 8) if FULL else (6, 5, 3)
OUTAGE_S = 60 if FULL else 10
FAULT_SHARE = 0.1
# The endpoint under load: seconds, and numbers of adapters published, retired and rolled back.
LOAD_S = 180 if FULL else 20
CHANGES = (50, 20, 5) if FULL else (6, 3, 2)
