"""Probe which layers of a generator matter for a domain: write a report and print its tables.

python -m jobs.probe method=gradient base=miniature gradient.learning_rate=1e-4 data=FOLDER \
    images=16 output=s3://bucket/reports/fog.json

The report can be the ``targets`` of a generator's recipe; ``loraseg report show`` prints it.
"""

import sys
from dataclasses import dataclass, field

from actors.resources import ResourceConfig, connect_with_capacity
from actors.tasks import call_on_ray
from loraseg import config as configuration
from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.probes.tables import format_report
from loraseg.probes.task import ProbeTask, run_probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The probe, and its resources on Ray.

    Attributes:
        probe: Its fields are keys of this config.
        resources: Resources of the worker.
    """

    probe: ProbeTask = field(metadata=configuration.INLINED)
    resources: ResourceConfig = field(default_factory=ResourceConfig)


def main(config: Config) -> None:
    """Run the probe unless its report exists, and print the report."""
    task = config.probe.resolved()
    connect_with_capacity(config.resources)
    title = f"{task.method} probe of {task.base}"
    result = call_on_ray(run_probe, task, title=title, resources=config.resources)
    state = "probed before" if result.skipped else "written"
    sys.stdout.write(
        f"{format_report(LayerReport.from_bytes(result.report))}\n{task.output}: {state}\n"
    )


if __name__ == "__main__":
    configuration.main(main, Config, description=__doc__)
