"""The progress tracker with a fake clock."""

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


def test_the_remaining_time_follows_the_speed_of_the_current_worker(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(0, phase="evaluate"), "a")
    clock.now = 1000.0
    tracker.put(at(40), "a")
    assert tracker.read()["fog"].remaining_s is None
    clock.now = 1005.0
    tracker.put(at(50), "a")
    # 10 steps in 5 s: the remaining 50 take 25 s. The 40 steps of an earlier run and the evaluation
    # do not count.
    assert tracker.read()["fog"].remaining_s == pytest.approx(25.0)


def test_another_worker_counts_as_a_restart_and_has_its_own_speed(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(60), "a")
    clock.now = 100.0
    tracker.put(at(30), "b")
    current = tracker.read()["fog"]
    assert (current.restarts, current.remaining_s) == (1, None)
    clock.now = 110.0
    tracker.put(at(50), "b")
    assert tracker.read()["fog"].remaining_s == pytest.approx(25.0)


def test_adapters_are_independent(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(10, name="fog"), "a")
    tracker.put(at(20, name="rain"), "b")
    steps = {name: current.progress.step for name, current in tracker.read().items()}
    assert steps == {"fog": 10, "rain": 20}


def test_only_changes_are_listed(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(10, name="fog"), "a")
    tracker.put(at(20, name="rain"), "b")
    before = tracker.read()
    clock.now = 2.0
    tracker.put(at(40, name="rain"), "b")
    (line,) = format_changes(before, tracker.read())
    assert line == "rain: train 40/100  loss 0.5000  20.0 images/s  0:00:06 left"


def test_a_lost_worker_is_listed(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(60), "a")
    before = tracker.read()
    tracker.put(at(0, phase="evaluate"), "b")
    lines = format_changes(before, tracker.read())
    assert lines == ["fog: its worker was lost, another took over", "fog: evaluate 0/100"]


def test_unchanged_progress_is_listed_once(clock):
    tracker = ProgressTracker(clock)
    tracker.put(at(100, phase="evaluate"), "a")
    before = tracker.read()
    tracker.put(at(100, phase="evaluate"), "a")
    assert format_changes(before, tracker.read()) == []
