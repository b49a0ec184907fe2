"""Executors for tests."""

from dataclasses import replace


class StageReplacer:
    """Runs other steps in place of some stages of a job."""

    def __init__(self, executor, **factories):
        """``factories`` maps names of stages to what builds the step from the run state."""
        self._executor, self._factories = executor, factories
        self.threads, self.device, self.call = executor.threads, executor.device, executor.call

    def run(self, stages, state, units):
        replaced = [
            replace(stage, make=self._factories.get(stage.name, stage.make)) for stage in stages
        ]
        return self._executor.run(replaced, state, units)


class UnusedExecutor:
    """Fails if a job calls it."""

    threads, device = 1, "cpu"

    def call(self, function, *arguments):
        raise AssertionError(f"{function.__name__} is called")

    def run(self, stages, state, units):
        raise AssertionError(f"{len(units)} units are run")
