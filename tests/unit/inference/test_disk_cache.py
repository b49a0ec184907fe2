import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.packed import pack
from loraseg.errors import IntegrityError, StoreError
from loraseg.inference.disk_cache import AdapterDiskCache


def make(number, size=64):
    pairs = {"a": LoraPair(torch.full((1, size), number + 1.0), torch.ones(size, 1), 1.0)}
    return pack(Adapter(name=str(number), pairs=pairs, digest=f"{number:064x}"))


def test_an_adapter_can_be_read_by_another_instance(tmp_path):
    folder = AdapterDiskCache(tmp_path / "packed")
    assert folder.get(make(1).digest) is None
    folder.put(make(1))
    again = AdapterDiskCache(tmp_path / "packed").get(make(1).digest)
    assert torch.equal(again.blocks[64, 64].down, make(1).blocks[64, 64].down)


def test_least_recently_used_files_are_deleted_first(tmp_path):
    one = AdapterDiskCache(tmp_path / "size")
    one.put(make(0))
    size = next((tmp_path / "size").iterdir()).stat().st_size
    folder = AdapterDiskCache(tmp_path / "packed", limit_bytes=3 * size)
    kept = [folder.put(make(number)) for number in range(3)]
    for age, number in enumerate((1, 2, 0)):
        os.utime(tmp_path / "packed" / f"{number:064x}.safetensors", (age, age))
    folder.put(make(3))
    there = [number for number in range(4) if folder.get(f"{number:064x}")]
    assert there == [0, 3]  # down to nine tenths of the limit
    assert torch.equal(kept[1].blocks[64, 64].down, make(1).blocks[64, 64].down)


def test_a_damaged_or_renamed_file_counts_as_missing(tmp_path, caplog):
    folder = AdapterDiskCache(tmp_path)
    folder.put(make(1))
    path = tmp_path / f"{1:064x}.safetensors"
    path.rename(tmp_path / f"{2:064x}.safetensors")
    assert folder.get(f"{2:064x}") is None
    assert "holds adapter" in caplog.text
    path.write_bytes(b"nonsense")
    assert folder.get(f"{1:064x}") is None
    assert "not usable" in caplog.text


def test_without_a_writable_disk_the_adapter_stays_in_memory(tmp_path, caplog):
    (tmp_path / "packed").write_text("a file where the folder should be")
    packed = AdapterDiskCache(tmp_path / "packed").put(make(1))
    assert packed.digest == f"{1:064x}"
    assert "not kept" in caplog.text


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_digests_are_file_names(tmp_path, digest):
    with pytest.raises(IntegrityError, match="64 hex digits"):
        AdapterDiskCache(tmp_path).get(digest)


def test_old_partial_files_are_deleted(tmp_path):
    folder = AdapterDiskCache(tmp_path)
    old, new = (tmp_path / f".{2:064x}.safetensors.{end}" for end in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    folder.put(make(1))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_read_only_folder_can_be_read(tmp_path, monkeypatch):
    folder = AdapterDiskCache(tmp_path)
    folder.put(make(1))

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert folder.get(make(1).digest) is not None


TIMEOUT_S = 60
ROOT = Path(__file__).parents[3]
DIGEST = f"{1:064x}"
# Prints a line, then creates the adapter when its standard input is closed.
FETCH = """
import sys
from pathlib import Path
from loraseg.inference.disk_cache import AdapterDiskCache
from tests.unit.inference.test_disk_cache import make

def slowly():
    print("making", flush=True)
    sys.stdin.read()
    return make(1)

packed = AdapterDiskCache(Path(sys.argv[1])).get_or_create(make(1).digest, slowly)
print("fetched", packed.digest, flush=True)
"""


# Creates an adapter 100 times, as if it were never kept.
COUNT = """
import sys
from pathlib import Path
from loraseg.inference.disk_cache import AdapterDiskCache
from tests.unit.inference.test_disk_cache import make

folder = Path(sys.argv[1])
counter = folder / "counter"

def increment():
    counter.write_text(str(int(counter.read_text()) + 1))
    return make(1)

cache = AdapterDiskCache(folder)
cache.get = lambda digest: None  # every call creates
for _ in range(100):
    cache.get_or_create(make(1).digest, increment)
"""


def refuse_to_create():
    raise AssertionError("it exists already")


@pytest.fixture
def other_process(tmp_path):
    """A process that is creating adapter 1."""
    with subprocess.Popen(
        [sys.executable, "-c", FETCH, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout.readline() == "making\n"
        yield process
        process.kill()


def files(folder):
    """Return the names of all files but locks, which stay after use."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_one_process_at_a_time_creates_an_adapter(tmp_path):
    """A counter without a lock of its own, incremented by every creation."""
    (tmp_path / "counter").write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], cwd=ROOT) for _ in range(3)
    ]
    assert [process.wait(TIMEOUT_S) for process in processes] == [0] * 3
    assert (tmp_path / "counter").read_text() == str(3 * 100)


def test_an_adapter_is_created_once_and_then_mapped(tmp_path):
    folder = AdapterDiskCache(tmp_path / "packed")
    made = folder.get_or_create(DIGEST, lambda: make(1))
    again = AdapterDiskCache(tmp_path / "packed").get_or_create(DIGEST, refuse_to_create)
    for packed in (made, again):
        assert packed.digest == DIGEST
        assert torch.equal(packed.blocks[64, 64].down, make(1).blocks[64, 64].down)
    assert files(tmp_path / "packed") == [f"{DIGEST}.safetensors"]


def test_threads_that_need_the_same_adapter_create_it_once(tmp_path):
    started, made = threading.Barrier(8, timeout=TIMEOUT_S), []

    def slowly():
        made.append(1)
        threading.Event().wait(0.1)
        return make(1)

    def fetch(_):
        folder = AdapterDiskCache(tmp_path)
        started.wait()
        return folder.get_or_create(DIGEST, slowly).digest

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(fetch, range(8))) == {DIGEST}
    assert made == [1]


def test_others_wait_for_the_process_that_creates_it(tmp_path, other_process):
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(AdapterDiskCache(tmp_path).get_or_create, DIGEST, refuse_to_create)
        other_process.stdin.close()
        assert waiting.result(TIMEOUT_S).digest == DIGEST
    assert other_process.stdout.readline() == f"fetched {DIGEST}\n"
    assert other_process.wait(TIMEOUT_S) == 0
    assert files(tmp_path) == [f"{DIGEST}.safetensors"]


def test_other_adapters_do_not_wait(tmp_path):
    folder = AdapterDiskCache(tmp_path)

    def create_another():
        assert folder.get_or_create(f"{2:064x}", lambda: make(2)).digest == f"{2:064x}"
        return make(1)

    assert folder.get_or_create(DIGEST, create_another).digest == DIGEST


def test_another_process_takes_over_when_the_creating_one_is_killed(tmp_path, other_process):
    began = threading.Event()

    def take_over():
        began.set()
        return make(1)

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(AdapterDiskCache(tmp_path).get_or_create, DIGEST, take_over)
        assert not began.wait(0.2)
        other_process.kill()
        assert waiting.result(TIMEOUT_S).digest == DIGEST
    assert began.is_set()
    assert files(tmp_path) == [f"{DIGEST}.safetensors"]


def test_a_stopped_process_delays_others_only_until_the_timeout(tmp_path, other_process, caplog):
    os.kill(other_process.pid, signal.SIGSTOP)
    folder = AdapterDiskCache(tmp_path, lock_timeout_s=0.1)
    assert folder.get_or_create(DIGEST, lambda: make(1)).digest == DIGEST
    assert "creating it anyway" in caplog.text
    os.kill(other_process.pid, signal.SIGCONT)
    other_process.stdin.close()
    assert other_process.stdout.readline() == f"fetched {DIGEST}\n"
    assert other_process.wait(TIMEOUT_S) == 0
    assert files(tmp_path) == [f"{DIGEST}.safetensors"]


def test_old_lock_files_are_removed_by_a_scan_and_recent_ones_are_kept(tmp_path):
    old, new = (tmp_path / f".{number:064x}.lock" for number in (3, 4))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    AdapterDiskCache(tmp_path).get_or_create(DIGEST, lambda: make(1))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_lock_in_use_survives_a_scan(tmp_path):
    lock = tmp_path / f".{2:064x}.lock"
    with FileLock(lock):
        AdapterDiskCache(tmp_path).get_or_create(DIGEST, lambda: make(1))
        assert lock.exists()


def test_an_error_while_creating_frees_the_lock(tmp_path):
    def fail():
        raise ValueError("a bug")

    cache = AdapterDiskCache(tmp_path, lock_timeout_s=0.0)
    with pytest.raises(ValueError, match="a bug"):
        cache.get_or_create(DIGEST, fail)
    with FileLock(tmp_path / f".{DIGEST}.lock", timeout=0.0) as lock:
        assert lock.is_locked


def test_an_error_is_raised_and_the_next_call_tries_again(tmp_path):
    def fail():
        raise StoreError("the store is down")

    folder = AdapterDiskCache(tmp_path)
    with pytest.raises(StoreError, match="the store is down"):
        folder.get_or_create(DIGEST, fail)
    assert files(tmp_path) == []
    assert folder.get_or_create(DIGEST, lambda: make(1)).digest == DIGEST


def test_a_created_adapter_with_another_digest_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=f"got digest {2:064x}, expected {DIGEST}"):
        AdapterDiskCache(tmp_path).get_or_create(DIGEST, lambda: make(2))
    assert files(tmp_path) == []


@pytest.mark.parametrize("place", [0, 200, -1])
def test_a_damaged_file_is_created_again(tmp_path, place):
    folder = AdapterDiskCache(tmp_path)
    folder.put(make(1))
    path = tmp_path / f"{DIGEST}.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    made = folder.get_or_create(DIGEST, lambda: make(1))
    assert torch.equal(made.blocks[64, 64].down, make(1).blocks[64, 64].down)
    assert folder.get_or_create(DIGEST, refuse_to_create).digest == DIGEST


def test_without_a_disk_an_adapter_is_created_each_time(tmp_path, caplog):
    (tmp_path / "packed").write_text("a file where the folder should be")
    made = AdapterDiskCache(tmp_path / "packed").get_or_create(DIGEST, lambda: make(1))
    assert torch.equal(made.blocks[64, 64].down, make(1).blocks[64, 64].down)
    assert "not kept" in caplog.text


def test_several_writers_stay_close_to_the_limit(tmp_path):
    AdapterDiskCache(tmp_path).put(make(0))
    size = next(tmp_path.iterdir()).stat().st_size
    writers = [AdapterDiskCache(tmp_path, limit_bytes=64 * size) for _ in range(3)]
    for number in range(300):
        writers[number % 3].put(make(number))
        # Each sees what the others wrote after a 32nd of the limit, here two files.
        assert len(files(tmp_path)) <= 64 + 3 * 2
    newest = files(tmp_path)[-40:]
    assert newest == [f"{number:064x}.safetensors" for number in range(260, 300)]
