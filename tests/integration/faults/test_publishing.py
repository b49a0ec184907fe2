"""Many processes publish at once while others list and load; publishers die now and then."""

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

# Of a publication: two blobs, the record, the snapshot, HEAD. The first one probes the store with
# five writes before.
_WRITES_OF_ONE = 5
_BLOBS_WRITTEN = 5 + 2


def test_publishers_and_readers(workplace, chronicle):
    readers = start_readers(workplace)
    started = time.perf_counter()
    publishers = [workplace.start(publish_many, name, ADAPTERS) for name in names()]
    check_exit_codes(publishers)
    seconds = time.perf_counter() - started
    finish(workplace, readers)
    log_summary(chronicle, workplace, seconds)
    expected = {adapter_name(name, number) for name in names() for number in range(ADAPTERS)}
    check_library(workplace.uri, expected)
    assert verify(workplace)[-1].endswith("objects checked, ok")
    assert Library(open_store(workplace.uri)).generation() == len(expected)


def test_dying_publishers_and_readers(workplace, chronicle):
    """The first dies after its blobs and for good, the others at random; half of them come back."""
    readers = start_readers(workplace)
    random = numpy_generator(SEED, "dying publishers")
    strikes = [(_BLOBS_WRITTEN, False)]
    for _ in names()[1:]:
        at = int(random.integers(5, 5 + ADAPTERS * _WRITES_OF_ONE))
        strikes.append((at + 1, bool(random.integers(2))))
    publishers = []
    for name, (dies_at, before) in zip(names(), strikes, strict=True):
        chronicle.append(f"{name} dies {'before' if before else 'after'} its write {dies_at}")
        publishers.append(workplace.start(publish_many, name, ADAPTERS, dies_at, before))
    back = []
    for number, process in enumerate(publishers):
        process.join()
        assert process.exitcode in (0, -9)
        if number % 2:
            back.append(workplace.start(publish_many, process.name, ADAPTERS))
    check_exit_codes(back)
    finish(workplace, readers)
    chronicle.append(f"killed: {sum(process.exitcode == -9 for process in publishers)}")
    whole = {adapter_name(p.name, number) for p in back for number in range(ADAPTERS)}
    library = Library(open_store(workplace.uri))
    found = {entry.name for entry in library.entries()}
    assert found >= whole
    check_library(workplace.uri, found)
    lines = verify(workplace)
    chronicle.append(f"verify: {lines[-1].split(': ')[1]}, {len(lines) - 1} unused")
    assert all(line.startswith("unused: ") for line in lines[:-1])
    assert adapter_name("p00", 0) not in found
    assert f"unused: {orphan_of('p00')}" in lines


def names():
    return [f"p{number:02d}" for number in range(PUBLISHERS)]


def start_readers(place):
    return [place.start(read_until_finished, f"reader{number}") for number in range(READERS)]


def check_exit_codes(processes):
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def finish(place, readers):
    """Tell the readers that all is published; each must have seen it all, and nothing half."""
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
    """Return what the command line tool prints; it ends well."""
    command = [str(Path(sys.executable).with_name("loraseg")), "library", "verify", place.uri]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def orphan_of(publisher):
    """Return where the weights of a publisher's first adapter are."""
    name = adapter_name(publisher, 0)
    weights = files_of(name)["adapter_model.safetensors"]
    return blob_key(hashlib.sha256(weights).hexdigest())


def log_summary(chronicle, place, seconds):
    reports = place.reports("p")
    each = np.concatenate([report["seconds"] for report in reports])
    counts = sum((Counter(report["counts"]) for report in reports), Counter())
    attempts = counts["exists catalog"]
    chronicle.append(
        f"{each.size} adapters in {seconds:.1f} s; one takes median {np.median(each):.2f} s, "
        f"longest {each.max():.2f} s, {1e3 * sum(r['cpu_s'] for r in reports) / each.size:.0f} ms "
        f"of CPU, {counts['requests'] / each.size:.1f} requests, "
        f"{attempts / each.size - 1:.2f} lost attempts"
    )
    readers = place.reports("reader")
    chronicle.append(
        f"{len(readers)} readers saw {sum(r['generations'] for r in readers)} generations and "
        f"loaded {sum(r['loaded'] for r in readers)} adapters"
    )
