"""A driver that runs the training job with a kill schedule, and tells its workers its process id.

Arguments: the manifest, and a file with the pickled schedule.
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
    schedule = pickle.loads(Path(sys.argv[2]).read_bytes())
    connect()
    schedule.driver_file.write_text(str(os.getpid()))
    outcomes = list(train_adapters(config.tasks(), config.resources, runner=schedule))
    sys.exit(any(outcome.result is None for outcome in outcomes))
