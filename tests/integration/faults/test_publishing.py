"""Many processes publish at once while others list and load; some publishers are killed."""

import hashlib
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loraseg.library import Library
from loraseg.library.records import blob_key
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store
from tests.integration.faults.publishing import adapter_name, publish_many, read_until_finished
from tests.integration.faults.suite_size import ADAPTERS, PUBLISHERS, READERS, SEED
from tests.integration.library.publishers import files_of

pytestmark = [pytest.mark.durable, pytest.mark.faults, pytest.mark.timeout(1500)]

# Writes of a publication: two blobs, the record, the snapshot, HEAD. Five writes before the first
# one probe the store.
_WRITES_PER_ADAPTER = 5
_WRITES_UNTIL_BLOBS = 5 + 2


def test_publishers_and_readers(environment, fault_log):
    readers = start_readers(environment)
    started = time.perf_counter()
    publishers = [environment.start(publish_many, name, ADAPTERS) for name in names()]
    check_exit_codes(publishers)
    seconds = time.perf_counter() - started
    finish(environment, readers)
    log_summary(fault_log, environment, seconds)
    expected = {adapter_name(name, number) for name in names() for number in range(ADAPTERS)}
    check_library(environment.uri, expected)
    assert verify(environment)[-1].endswith("objects checked, ok")
    assert Library(open_store(environment.uri)).generation() == len(expected)


def test_killed_publishers_and_readers(environment, fault_log):
    """The first is killed after its blobs, the others at random; every second one runs again."""
    readers = start_readers(environment)
    random = numpy_generator(SEED, "dying publishers")
    kills = [(_WRITES_UNTIL_BLOBS, False)]
    for _ in names()[1:]:
        write = int(random.integers(5, 5 + ADAPTERS * _WRITES_PER_ADAPTER))
        kills.append((write + 1, bool(random.integers(2))))
    publishers = []
    for name, (kill_at, before) in zip(names(), kills, strict=True):
        fault_log.append(f"{name} is killed {'before' if before else 'after'} write {kill_at}")
        publishers.append(environment.start(publish_many, name, ADAPTERS, kill_at, before))
    restarted = []
    for number, process in enumerate(publishers):
        process.join()
        assert process.exitcode in (0, -9)
        if number % 2:
            restarted.append(environment.start(publish_many, process.name, ADAPTERS))
    check_exit_codes(restarted)
    finish(environment, readers)
    fault_log.append(f"killed: {sum(process.exitcode == -9 for process in publishers)}")
    complete = {adapter_name(p.name, number) for p in restarted for number in range(ADAPTERS)}
    library = Library(open_store(environment.uri))
    published = {entry.name for entry in library.entries()}
    assert published >= complete
    check_library(environment.uri, published)
    lines = verify(environment)
    fault_log.append(f"verify: {lines[-1].split(': ')[1]}, {len(lines) - 1} unused")
    assert all(line.startswith("unused: ") for line in lines[:-1])
    assert adapter_name("p00", 0) not in published
    assert f"unused: {weights_key('p00')}" in lines


def names():
    return [f"p{number:02d}" for number in range(PUBLISHERS)]


def start_readers(place):
    return [place.start(read_until_finished, f"reader{number}") for number in range(READERS)]


def check_exit_codes(processes):
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def finish(place, readers):
    """Signal that all adapters are published, and check that each reader saw all of them."""
    place.finished.touch()
    check_exit_codes(readers)
    count = len(Library(open_store(place.uri)).entries())
    assert {report["entries"] for report in place.reports("reader")} == {count}


def check_library(uri, expected):
    library = Library(open_store(uri))
    entries = library.entries()
    assert {entry.name for entry in entries} == expected
    for entry in entries:
        assert library.load_entry(entry)[0] == files_of(entry.name)
        assert len(library.versions(entry.name)) == 1


def verify(place):
    """Return the output lines of ``loraseg library verify``, which must succeed."""
    command = [str(Path(sys.executable).with_name("loraseg")), "library", "verify", place.uri]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return completed.stdout.splitlines()


def weights_key(publisher):
    """Return the key of the weights of a publisher's first adapter."""
    name = adapter_name(publisher, 0)
    weights = files_of(name)["adapter_model.safetensors"]
    return blob_key(hashlib.sha256(weights).hexdigest())


def log_summary(fault_log, place, seconds):
    reports = place.reports("p")
    durations = np.concatenate([report["seconds"] for report in reports])
    counts = sum((Counter(report["counts"]) for report in reports), Counter())
    attempts = counts["exists catalog"]
    cpu_ms = 1e3 * sum(report["cpu_s"] for report in reports) / durations.size
    fault_log.append(
        f"{durations.size} adapters in {seconds:.1f} s; median {np.median(durations):.2f} s, "
        f"maximum {durations.max():.2f} s, {cpu_ms:.0f} ms "
        f"of CPU, {counts['requests'] / durations.size:.1f} requests, "
        f"{attempts / durations.size - 1:.2f} retries"
    )
    readers = place.reports("reader")
    fault_log.append(
        f"{len(readers)} readers saw {sum(r['generations'] for r in readers)} generations and "
        f"loaded {sum(r['loaded'] for r in readers)} adapters"
    )
