"""Score a library leave-one-out: print a table, write results.json and report.html.

ray job submit --working-dir . -- python -m jobs.evaluate --config evaluation.yaml images=20
"""

import sys
from dataclasses import dataclass, field

import torch

from actors.resources import ResourceConfig, connect_with_capacity
from actors.tasks import ordered_map
from loraseg import config as configuration
from loraseg.evaluate.output import write_results
from loraseg.evaluate.results import results_table
from loraseg.evaluate.run import EvaluationConfig, evaluate


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The evaluation, and where it runs.

    Attributes:
        evaluation: Its fields are keys of this config.
        resources: Resources of one domain on Ray, and the number of domains scored at once.
        local: Score one domain after another in this process, without Ray.
    """

    evaluation: EvaluationConfig = field(metadata=configuration.INLINED)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    local: bool = False


def main(config: Config) -> None:
    """Evaluate, write the results and print the table."""
    evaluation = config.evaluation
    if config.local:
        # The thread count of a worker: with another one, sums differ in their last bits.
        torch.set_num_threads(config.resources.threads)
        results = evaluate(evaluation)
    else:
        connect_with_capacity(config.resources)
        results = evaluate(evaluation, ordered_map(config.resources, "evaluate domain"))
    report = write_results(results, evaluation.output)
    sys.stdout.write(f"{results_table(results)}\nreport: {report}\n")


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
