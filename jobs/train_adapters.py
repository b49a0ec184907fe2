"""Train one adapter for each domain of a manifest, in parallel, and publish them to a library.

ray job submit --working-dir . -- python -m jobs.train_adapters --config manifest.yaml images=32

Exit status: 0 all published, 1 some failed (the others are published), 2 an error in the config.
"""

import sys
from dataclasses import dataclass, field

from actors.resources import ResourceConfig, check_capacity, connect
from actors.train_adapters import train_adapters
from loraseg import config as configuration
from loraseg.errors import LorasegError
from loraseg.storage import SHORT_RETRY_TIMEOUT_S, open_store, probe_conditional_writes
from loraseg.train.manifest import TrainingManifest
from loraseg.train.roles import ROLES
from loraseg.train.tables import format_skipped_files, plan_table, result_table
from loraseg.train.tasks import TrainingPlan, TrainingTask, plan_task


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(TrainingManifest):
    """A manifest, and the resources of each adapter."""

    resources: ResourceConfig = field(default_factory=ResourceConfig)
    dry_run: bool = False


def main(config: Config) -> int:
    """Run the job; return its exit status."""
    tasks = config.tasks()
    if config.dry_run:
        plans = [_plan(task) for task in tasks]
        sys.stdout.write(plan_table(plans, str(config.resources)))
        return int(any(isinstance(entry, tuple) for entry in plans))
    # Fails within seconds if the endpoint of the store is mistyped.
    probe_conditional_writes(open_store(tasks[0].library).with_retry_timeout(SHORT_RETRY_TIMEOUT_S))
    started_here = connect()
    check_capacity(config.resources, may_grow=not started_here)
    outcomes = list(train_adapters(tasks, config.resources))
    results = [o.result or (o.name, o.error or "") for o in outcomes]
    sys.stdout.write(
        result_table(results, ROLES[config.role].columns) + format_skipped_files(results)
    )
    return int(any(outcome.result is None for outcome in outcomes))


def _plan(task: TrainingTask) -> TrainingPlan | tuple[str, str]:
    try:
        return plan_task(task)
    except LorasegError as error:
        return task.name, str(error)


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
