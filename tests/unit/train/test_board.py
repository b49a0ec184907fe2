"""The progress board with a clock of our own."""

import dataclasses

import pytest

from loraseg.train.board import ProgressBoard, Report, changes


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def at(step, worker="a", *, name="fog", phase="train"):
    return Report(
        name=name, step=step, steps=100, loss=0.5, images_per_s=20.0, phase=phase, worker=worker
    )


@pytest.fixture
def clock():
    return Clock()


def test_a_report_says_what_a_task_says():
    from loraseg.train.tasks import Progress

    told = {field.name for field in dataclasses.fields(Progress)}
    assert {field.name for field in dataclasses.fields(Report)} == told | {"worker"}


def test_the_time_left_follows_the_pace_of_the_present_worker(clock):
    board = ProgressBoard(clock)
    board.put(at(0, phase="evaluate"))
    clock.now = 1000.0
    board.put(at(40))
    assert board.read()["fog"].remaining_s is None
    clock.now = 1005.0
    board.put(at(50))
    # 10 steps in 5 s leave 50 steps for 25 s: neither the 40 steps of an earlier run nor the
    # evaluation before the training count.
    assert board.read()["fog"].remaining_s == pytest.approx(25.0)


def test_another_worker_is_a_takeover_and_starts_its_own_pace(clock):
    board = ProgressBoard(clock)
    board.put(at(60, "a"))
    clock.now = 100.0
    board.put(at(30, "b"))
    standing = board.read()["fog"]
    assert (standing.takeovers, standing.remaining_s) == (1, None)
    clock.now = 110.0
    board.put(at(50, "b"))
    assert board.read()["fog"].remaining_s == pytest.approx(25.0)


def test_adapters_do_not_mix(clock):
    board = ProgressBoard(clock)
    board.put(at(10, "a", name="fog"))
    board.put(at(20, "b", name="rain"))
    steps = {name: standing.report.step for name, standing in board.read().items()}
    assert steps == {"fog": 10, "rain": 20}


def test_only_changes_are_told(clock):
    board = ProgressBoard(clock)
    board.put(at(10, "a", name="fog"))
    board.put(at(20, "b", name="rain"))
    before = board.read()
    clock.now = 2.0
    board.put(at(40, "b", name="rain"))
    (line,) = changes(before, board.read())
    assert line == "rain: train 40/100  loss 0.5000  20.0 images/s  0:00:06 left"


def test_a_lost_worker_is_told(clock):
    board = ProgressBoard(clock)
    board.put(at(60, "a"))
    before = board.read()
    board.put(at(0, "b", phase="evaluate"))
    lines = changes(before, board.read())
    assert lines == ["fog: its worker was lost, another took over", "fog: evaluate 0/100"]
