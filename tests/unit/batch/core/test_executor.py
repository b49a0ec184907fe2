"""Units pass through the stages, and errors of units end the loop."""

from dataclasses import dataclass

import pytest
import torch

from loraseg.batch.core import run as core_run
from loraseg.batch.core.executor import LocalExecutor, Stage, UnitResult
from loraseg.batch.core.run import Progress, run_units
from loraseg.errors import StageError


@dataclass(frozen=True)
class NumberUnit:
    number: int

    @property
    def id(self):
        return f"unit{self.number}"

    def __str__(self):
        return f"number {self.number}"


STAGES = (
    Stage("add", lambda state: lambda unit: unit.number + state),
    Stage("double", lambda state: lambda value: 2 * value),
)


def test_each_stage_takes_the_value_of_the_stage_before():
    units = [NumberUnit(number) for number in range(5)]
    expected = [(f"unit{number}", 2 * (number + 100)) for number in range(5)]
    assert list(run_units(LocalExecutor(), STAGES, 100, units)) == expected


def test_units_are_planned_in_batches(monkeypatch):
    monkeypatch.setattr(core_run, "_UNITS_PER_BATCH", 3)
    planned = []

    def plan():
        for number in range(7):
            planned.append(number)
            yield NumberUnit(number)

    counts = [len(planned) for _ in run_units(LocalExecutor(), STAGES, 0, plan())]
    assert counts == [3, 3, 3, 6, 6, 6, 7]


def test_stages_are_made_once_for_all_batches_of_a_job(monkeypatch):
    monkeypatch.setattr(core_run, "_UNITS_PER_BATCH", 2)
    made = []

    def make(state):
        made.append(state)
        return lambda unit: state + unit.number

    stages, executor = (Stage("add", make),), LocalExecutor()
    for state in (1000, 2000):
        results = run_units(executor, stages, state, [NumberUnit(number) for number in range(5)])
        assert [value for _, value in results] == [state + number for number in range(5)]
    assert made == [1000, 2000]


def test_an_error_of_a_unit_skips_its_later_stages_and_ends_the_loop():
    calls = []

    def make_failing(state):
        def fail(value):
            raise StageError(f"no result of {value}")

        return fail

    stages = (STAGES[0], Stage("fail", make_failing), Stage("record", lambda state: calls.append))
    with pytest.raises(StageError, match="no result of 7"):
        list(run_units(LocalExecutor(), stages, 7, [NumberUnit(0), NumberUnit(1)]))
    assert calls == []
    error = StageError("lost")
    failed = UnitResult.start(NumberUnit(3)).fail(error)
    assert (failed.description, failed.value, failed.error) == ("number 3", None, error)
    assert failed.apply(lambda value: value) is failed


def test_other_errors_are_not_caught():
    stages = (Stage("divide", lambda state: lambda unit: 1 / unit.number),)
    with pytest.raises(ZeroDivisionError):
        list(run_units(LocalExecutor(), stages, None, [NumberUnit(0)]))


def test_stages_run_with_the_threads_of_the_executor():
    before = torch.get_num_threads()
    stages = (Stage("threads", lambda state: lambda unit: torch.get_num_threads()),)
    for threads in (1, 2):
        executor = LocalExecutor(threads)
        assert executor.call(torch.get_num_threads) == threads
        assert list(run_units(executor, stages, None, [NumberUnit(0)])) == [("unit0", threads)]
    assert torch.get_num_threads() == before


def test_progress_is_logged_every_ten_seconds_and_at_the_end(caplog):
    caplog.set_level("INFO", logger=core_run.__name__)
    times = iter([0.0, 1.0, 11.0, 12.0, 16.0])
    progress = Progress(40, clock=lambda: next(times))
    for _ in range(4):
        progress.update(10, "detail")
    assert [record.message for record in caplog.records] == [
        "20 of 40 images done (detail), 1.82 per second, 11 s left",
        "40 of 40 images done (detail), 2.50 per second, 0 s left",
    ]


def test_progress_without_a_total_has_no_end(caplog):
    caplog.set_level("INFO", logger=core_run.__name__)
    times = iter([0.0, 10.0])
    Progress(clock=lambda: next(times)).update(5, "1 without a mask")
    assert caplog.messages == ["5 images done (1 without a mask), 0.50 per second"]
