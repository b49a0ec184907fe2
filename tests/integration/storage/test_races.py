"""Many processes at one store. On moto these only show that the tests work: it is one process."""

import concurrent.futures
import multiprocessing

import pytest

from loraseg.storage import open_store
from tests.integration.storage import workers

WORKERS = 8


@pytest.fixture
def processes():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        WORKERS, context, initializer=workers.set_barrier, initargs=(context.Barrier(WORKERS),)
    ) as pool:
        yield pool


def test_a_race_has_one_winner(store_uri, processes):
    rounds = 50
    futures = [processes.submit(workers.create_all, store_uri, i, rounds) for i in range(WORKERS)]
    won = [future.result() for future in futures]
    assert sorted(number for numbers in won for number in numbers) == list(range(rounds))
    store = open_store(store_uri)
    for worker, numbers in enumerate(won):
        for number in numbers:
            assert store.get(f"race/{number}") == f"{worker}".encode()


def test_no_increment_is_lost(store_uri, processes):
    times = 20
    store = open_store(store_uri)
    store.put("counter", b"0")
    futures = [processes.submit(workers.count_up, store_uri, times) for _ in range(WORKERS)]
    lost = sum(future.result() for future in futures)
    assert store.get("counter") == b"%d" % (WORKERS * times)
    assert lost > 0, "no swap was contended, so the test showed nothing"


def test_readers_never_see_a_mixture(store_uri, processes):
    size_bytes = 300_000
    open_store(store_uri).put("shared", bytes(size_bytes))
    half = WORKERS // 2
    writers = [
        processes.submit(workers.overwrite, store_uri, i, 10, size_bytes) for i in range(half)
    ]
    readers = [processes.submit(workers.read_shared, store_uri, 30) for _ in range(half)]
    for future in writers:
        future.result()
    assert [mixture for future in readers for mixture in future.result()] == []
