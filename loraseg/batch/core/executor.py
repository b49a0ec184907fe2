"""Stages, work units, and the executors that send one through the other."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from loraseg.backbones.device import best_device
from loraseg.errors import LorasegError
from loraseg.train.core.threads import fixed_threads

__all__ = ["Executor", "LocalExecutor", "Stage", "UnitResult", "WorkUnit"]

ResultT = TypeVar("ResultT")


@runtime_checkable
class WorkUnit(Protocol):
    """What one worker processes at once and commits as one file."""

    @property
    def id(self) -> str:
        """Name of the unit, derived from its content: equal units of two runs share it."""
        ...

    def __str__(self) -> str:
        """Return a short description for error messages."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the work on a unit.

    Attributes:
        name: Shown in error messages.
        make: Builds the step from the run state, once per worker. The step is a callable: the first
            stage's takes a unit, a later one takes the return value of the stage before. It loads
            its models at the first call, so that a failure to load them is an error of the unit.
    """

    name: str
    make: Callable[[Any], Callable[[Any], Any]]


@dataclass(frozen=True, slots=True, eq=False)
class UnitResult:
    """A unit between two stages, or after the last one.

    Attributes:
        unit_id: The unit's id.
        description: The unit's description.
        value: Return value of the last stage; at first the unit itself, None after an error.
        error: Error of the stage that failed; later stages do not run.
    """

    unit_id: str
    description: str
    value: Any
    error: LorasegError | None = None

    @classmethod
    def start(cls, unit: WorkUnit) -> "UnitResult":
        """Return what enters the first stage."""
        return cls(unit.id, str(unit), unit)

    def apply(self, step: Callable[[Any], Any]) -> "UnitResult":
        """Run a step, unless an earlier one has failed; a LorasegError becomes ``error``."""
        if self.error is not None:
            return self
        try:
            return replace(self, value=step(self.value))
        except LorasegError as error:
            return self.fail(error)

    def fail(self, error: LorasegError) -> "UnitResult":
        """Return the result of a unit that failed."""
        return replace(self, value=None, error=error)


@runtime_checkable
class Executor(Protocol):
    """Runs the work of a batch job, in this process or on a cluster.

    Attributes:
        threads: Torch threads of each worker.
        device: Kind of device that the models run on.
    """

    threads: int
    device: Literal["cpu", "gpu"]

    def call(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Call a function where the models are, with the executor's threads.

        Raises:
            StageError: The worker was lost too often.
            LorasegError: As raised by the function.
        """
        ...

    def run(
        self, stages: Sequence[Stage], state: Any, units: Sequence[WorkUnit]
    ) -> Generator[UnitResult, None, None]:
        """Send units through all stages and yield their results as they complete.

        Closing the generator cancels what has not completed.

        Raises:
            StageError: Workers were lost too often.
        """
        ...


class LocalExecutor:
    """Processes one unit after another in this process."""

    def __init__(self, threads: int = 1) -> None:
        """Set the number of torch threads that stages and functions run with."""
        self.threads = threads
        self.device: Literal["cpu", "gpu"] = "cpu" if best_device().type == "cpu" else "gpu"
        self._made: tuple[Sequence[Stage], Any, list[Callable[[Any], Any]]] | None = None

    def call(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Call a function with the executor's threads."""
        with fixed_threads(self.threads):
            return function(*arguments)

    def run(
        self, stages: Sequence[Stage], state: Any, units: Sequence[WorkUnit]
    ) -> Generator[UnitResult, None, None]:
        """Yield the results in the order of the units."""
        steps = self._steps(stages, state)
        for unit in units:
            result = UnitResult.start(unit)
            with fixed_threads(self.threads):
                for step in steps:
                    result = result.apply(step)
            yield result

    def _steps(self, stages: Sequence[Stage], state: Any) -> list[Callable[[Any], Any]]:
        # A job calls `run` for each batch of units; its models are loaded once.
        if self._made is None or self._made[0] is not stages or self._made[1] is not state:
            self._made = (stages, state, [stage.make(state) for stage in stages])
        return self._made[2]
