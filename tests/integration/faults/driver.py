"""A driver that does what the training job does, and lets its workers find and kill it.

Arguments: the manifest, and a file with the pickled ambush.
"""

import os
import pickle
import sys
from pathlib import Path

import jobs.train_adapters as job
from actors.resources import connect
from actors.train_adapters import train_adapters
from loraseg import config as configuration

if __name__ == "__main__":
    config = configuration.load(job.Config, Path(sys.argv[1]))
    ambush = pickle.loads(Path(sys.argv[2]).read_bytes())
    connect()
    ambush.driver_file.write_text(str(os.getpid()))
    outcomes = list(train_adapters(config.tasks(), config.resources, runner=ambush))
    sys.exit(any(outcome.result is None for outcome in outcomes))
