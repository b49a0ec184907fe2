import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraseg.inference import file_lock
from loraseg.inference.file_lock import locked, remove_if_free

TIMEOUT_S = 60.0
COUNT = """
import sys
from pathlib import Path
import file_lock

file_lock._POLL_S = 0.0  # all the time between opening and locking
counter = Path(sys.argv[1], "counter")
for _ in range(int(sys.argv[2])):
    with file_lock.locked(counter.with_name("lock"), 60.0) as is_held:
        assert is_held
        counter.write_text(str(int(counter.read_text()) + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from file_lock import locked

with locked(Path(sys.argv[1]), 60.0) as is_held:
    print(is_held, flush=True)
    time.sleep(600)
"""


def start(script, *arguments):
    # From its own folder the module comes without the package around it, which takes seconds.
    command = [sys.executable, "-c", script, *map(str, arguments)]
    folder = Path(file_lock.__file__).parent
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)


@pytest.fixture
def holder(tmp_path):
    with start(HOLD, tmp_path / "lock") as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_one_process_at_a_time(tmp_path):
    """A counter without a lock of its own, while its lock file comes and goes all the time."""
    (tmp_path / "counter").write_text("0")
    processes = [start(COUNT, tmp_path, 1000) for _ in range(4)]
    assert [process.wait(TIMEOUT_S) for process in processes] == [0] * 4
    for process in processes:
        process.stdout.close()
    assert (tmp_path / "counter").read_text() == "4000"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_one_thread_at_a_time(tmp_path):
    inside = []

    def enter(_):
        with locked(tmp_path / "lock", TIMEOUT_S) as is_held:
            inside.append(1)
            threading.Event().wait(0.002)
            return is_held, inside.pop(), len(inside)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(enter, range(40))) == {(True, 1, 0)}


def test_a_killed_holder_frees_it(tmp_path, holder):
    with locked(tmp_path / "lock", 0.0) as is_held:
        assert not is_held
    waited = threading.Event()

    def wait():
        with locked(tmp_path / "lock", TIMEOUT_S) as is_held:
            waited.set()
            return is_held

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(wait)
        assert not waited.wait(0.2)
        holder.kill()
        assert waiting.result(TIMEOUT_S) is True
    assert not (tmp_path / "lock").exists()


def test_a_stuck_holder_is_waited_for_no_longer_than_our_patience(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with locked(tmp_path / "lock", 0.1) as is_held:
        assert not is_held
    assert (tmp_path / "lock").exists(), "it is still the holder's"


def test_only_files_that_nobody_holds_are_removed(tmp_path, holder):
    left = tmp_path / "left"
    left.touch()
    for path in (left, tmp_path / "lock"):
        remove_if_free(path)
    assert not left.exists()
    assert (tmp_path / "lock").exists()


def test_without_a_folder_the_block_runs_without_it(tmp_path):
    with locked(tmp_path / "missing" / "lock", TIMEOUT_S) as is_held:
        assert not is_held


def test_an_error_in_the_block_frees_it(tmp_path):
    with pytest.raises(ValueError, match="a bug"), locked(tmp_path / "lock", 0.0):
        raise ValueError("a bug")
    with locked(tmp_path / "lock", 0.0) as is_held:
        assert is_held
