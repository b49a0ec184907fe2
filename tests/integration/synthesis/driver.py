"""A driver that runs the synthesis job with a fault, and tells its workers its process id.

Arguments: the config, and a file with the pickled fault.
"""

import os
import pickle
import sys
from pathlib import Path

import jobs.synthesize as job
from actors.executor import RayExecutor
from loraseg import config as configuration
from loraseg.batch.synthesize.run import synthesize
from tests.executors import StageReplacer

if __name__ == "__main__":
    config = configuration.load(job.Config, Path(sys.argv[1]))
    fault = pickle.loads(Path(sys.argv[2]).read_bytes())
    fault.driver_file.write_text(str(os.getpid()))
    executor = RayExecutor(config.generators, config.voters)
    synthesize(config.synthesis, StageReplacer(executor, **{fault.stage: fault}))
