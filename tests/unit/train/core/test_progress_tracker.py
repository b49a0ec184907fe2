"""The progress board with a clock of our own."""

import pytest

from loraseg.train.core.progress import Progress
from loraseg.train.core.progress_tracker import ProgressTracker, format_changes


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def at(step, *, name="fog", phase="train"):
    loss = 0.5 if phase == "train" else float("nan")
    return Progress(name, step, steps=100, loss=loss, images_per_s=20.0, phase=phase)


@pytest.fixture
def clock():
    return Clock()


def test_the_time_left_follows_the_pace_of_the_present_worker(clock):
    board = ProgressTracker(clock)
    board.put(at(0, phase="evaluate"), "a")
    clock.now = 1000.0
    board.put(at(40), "a")
    assert board.read()["fog"].remaining_s is None
    clock.now = 1005.0
    board.put(at(50), "a")
    # 10 steps in 5 s leave 50 steps for 25 s: neither the 40 steps of an earlier run nor the
    # evaluation before the training count.
    assert board.read()["fog"].remaining_s == pytest.approx(25.0)


def test_another_worker_is_a_takeover_and_starts_its_own_pace(clock):
    board = ProgressTracker(clock)
    board.put(at(60), "a")
    clock.now = 100.0
    board.put(at(30), "b")
    standing = board.read()["fog"]
    assert (standing.restarts, standing.remaining_s) == (1, None)
    clock.now = 110.0
    board.put(at(50), "b")
    assert board.read()["fog"].remaining_s == pytest.approx(25.0)


def test_adapters_do_not_mix(clock):
    board = ProgressTracker(clock)
    board.put(at(10, name="fog"), "a")
    board.put(at(20, name="rain"), "b")
    steps = {name: standing.progress.step for name, standing in board.read().items()}
    assert steps == {"fog": 10, "rain": 20}


def test_only_changes_are_told(clock):
    board = ProgressTracker(clock)
    board.put(at(10, name="fog"), "a")
    board.put(at(20, name="rain"), "b")
    before = board.read()
    clock.now = 2.0
    board.put(at(40, name="rain"), "b")
    (line,) = format_changes(before, board.read())
    assert line == "rain: train 40/100  loss 0.5000  20.0 images/s  0:00:06 left"


def test_a_lost_worker_is_told(clock):
    board = ProgressTracker(clock)
    board.put(at(60), "a")
    before = board.read()
    board.put(at(0, phase="evaluate"), "b")
    lines = format_changes(before, board.read())
    assert lines == ["fog: its worker was lost, another took over", "fog: evaluate 0/100"]


def test_standing_still_is_not_told_twice(clock):
    board = ProgressTracker(clock)
    board.put(at(100, phase="evaluate"), "a")
    before = board.read()
    board.put(at(100, phase="evaluate"), "a")
    assert format_changes(before, board.read()) == []
