"""Many publishers at one library: no entry is lost, and readers see whole generations."""

import concurrent.futures
import logging
import multiprocessing
import subprocess
import sys
import time

import numpy as np

from loraseg.library import Library
from loraseg.storage import open_store
from tests.integration.library import publishers

logger = logging.getLogger(__name__)

# Processes, threads in each, adapters of each thread; tests/integration/faults has more of them.
SIZE = (2, 2, 10)


def test_publishers_lose_nothing(store_uri):
    processes, threads, adapters = SIZE
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        futures = [
            pool.submit(publishers.publish_many, store_uri, process, threads, adapters)
            for process in range(processes)
        ]
        seen = _watch(store_uri, futures)
        results = [future.result() for future in futures]
    seconds = np.array([each for _, each in results]).ravel()
    names = {name for published, _ in results for name in published}
    assert len(names) == processes * threads * adapters
    library = Library(open_store(store_uri))
    assert {entry.name for entry in library.entries()} == names
    assert library.generation() == len(names)
    report = library.verify()
    assert report.ok
    assert report.garbage == ()
    _check_growth(library, seen)
    logger.info(
        "%d adapters in %.1f s; a publication takes median %.2f s, longest %.2f s",
        *(len(names), time.perf_counter() - started, np.median(seconds), seconds.max()),
    )


def test_killed_publishers_leave_a_sound_library(store_uri):
    acknowledged = []
    for number in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", publishers.__name__, store_uri, f"victim{number}"],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            for _ in range(5 + number):
                acknowledged.append(process.stdout.readline().strip())
            process.kill()
            acknowledged += process.stdout.read().split()
    library = Library(open_store(store_uri))
    publishers.publish(library, "survivor", 0)
    names = {entry.name for entry in library.entries()}
    assert names >= {*acknowledged, "survivor"}
    assert library.verify().ok
    for name in acknowledged:
        assert library.load(name)[0] == publishers.files_of(name)


def _watch(uri, futures):
    """Read the catalog over and over; return the set of names by generation."""
    library = Library(open_store(uri))
    seen = {}
    while not all(future.done() for future in futures):
        generation = library.generation()
        seen[generation] = {entry.name for entry in library.entries(generation)}
        time.sleep(0.05)
    return seen


def _check_growth(library, seen):
    """One adapter more in every generation, and every earlier one still there."""
    assert seen
    previous = set()
    for generation, names in sorted(seen.items()):
        assert len(names) == generation
        assert names >= previous
        previous = names
    for generation in (0, 1, max(seen) // 2):
        assert len(library.entries(generation)) == generation
