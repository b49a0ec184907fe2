"""A driver that does what the synthesis job does, and lets its workers find and kill it.

Arguments: the config, and a file with the pickled accident.
"""

import os
import pickle
import sys
from pathlib import Path

import jobs.synthesize as job
from actors.synthesize import RaySynthesisExecutor
from loraseg import config as configuration
from loraseg.batch.synthesize.run import synthesize

if __name__ == "__main__":
    config = configuration.load(job.Config, Path(sys.argv[1]))
    accident = pickle.loads(Path(sys.argv[2]).read_bytes())
    accident.driver_file.write_text(str(os.getpid()))
    synthesize(
        config, RaySynthesisExecutor(config.generators, config.voters, **{accident.stage: accident})
    )
