"""Pauses of writers that compete: none for who is alone, bounded for all others."""

import types

import pytest

from loraseg.library import contention


@pytest.fixture
def pauses(monkeypatch):
    """Every pause at its longest, in the order in which they were made."""
    made = []
    monkeypatch.setattr(contention, "time", types.SimpleNamespace(sleep=made.append))
    monkeypatch.setattr(
        contention, "backoff_s", lambda attempt, first, longest: min(longest, first * 2**attempt)
    )
    return made


def test_a_single_writer_never_pauses(pauses):
    alone = contention.ContentionBackoff()
    for _ in range(5):
        alone.wait()
        alone.succeeded()
    assert pauses == []


def test_losses_lengthen_and_wins_shorten(pauses):
    turn = contention.ContentionBackoff()
    for _ in range(10):
        turn.failed()
        turn.wait()
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0, 1.0]
    pauses.clear()
    for _ in range(5):
        turn.succeeded()
        turn.wait()
    assert pauses == [0.32, 0.08, 0.02], "then none: it is alone"
