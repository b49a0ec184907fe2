"""Run one probe as one Ray task."""

import ray
from ray.exceptions import RayError, RayTaskError

from actors.resources import ResourceConfig
from actors.tasks import run_ray_tasks
from loraseg.errors import StageError
from loraseg.probes.task import ProbeResult, ProbeTask, run_probe

__all__ = ["probe_on_ray"]


def probe_on_ray(task: ProbeTask, resources: ResourceConfig) -> ProbeResult:
    """Run a probe on the connected cluster; a lost worker or node is made up for.

    Raises:
        LorasegError: What the probe itself raises.
        StageError: Workers were lost more often than the placement makes up for.
    """
    title = f"{task.method} probe of {task.base}"
    _, reference = next(run_ray_tasks(run_probe, [(title, (task,))], resources))
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The wrapper carries the worker's whole traceback; its cause says what went wrong.
        raise error.cause from error
    except RayError as error:
        raise StageError(f"{title}: lost for good: {error}") from error
