import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.packed import pack
from loraseg.errors import IntegrityError, StoreError
from loraseg.inference.adapter_cache import AdapterCache, CacheStats
from loraseg.inference.adapter_ref import AdapterFailure, AdapterUnavailableError
from tests.unit.inference.naive_retriever import Entry

TIMEOUT_S = 60


def make_entry(number):
    return Entry(f"a{number}", f"{number:064x}")


def make_adapter(number, size=16):
    pairs = {"layer": LoraPair(torch.ones(1, size), torch.ones(size, 1), 1.0)}
    return pack(Adapter(name=f"a{number}", pairs=pairs, digest=f"{number:064x}"))


ONE = make_adapter(0).nbytes


class Loader:
    """Counts loads and can be made to fail or to wait."""

    def __init__(self):
        self.loads = []
        self.broken = set()
        self.before = {}

    def __call__(self, entry):
        self.loads.append(entry.name)
        if wait := self.before.get(entry.name):
            wait()
        if entry.name in self.broken:
            raise StoreError(f"{entry.name}: gone")
        return make_adapter(int(entry.name[1:]))


def wait_until(condition):
    waited = threading.Event()
    for _ in range(TIMEOUT_S * 1000):
        if condition():
            return
        waited.wait(0.001)
    raise AssertionError("it never came true")


def test_most_recently_used_adapters_stay_within_the_limit():
    loader = Loader()
    cache = AdapterCache(loader, limit_bytes=2 * ONE)
    for number in (0, 1, 0, 2, 0, 1):
        assert cache(make_entry(number)).digest == make_entry(number).digest
        assert cache.size_bytes <= 2 * ONE
    assert loader.loads == ["a0", "a1", "a2", "a1"]
    assert len(cache) == 2


def test_a_hit_returns_the_same_object():
    cache = AdapterCache(Loader(), limit_bytes=2 * ONE)
    assert cache(make_entry(1)) is cache(make_entry(1))


def test_an_adapter_larger_than_the_limit_is_returned():
    loader = Loader()
    cache = AdapterCache(loader, limit_bytes=1)
    for number in (0, 1, 1):
        assert cache(make_entry(number)).digest == make_entry(number).digest
        assert (len(cache), cache.size_bytes) == (1, ONE)
    assert loader.loads == ["a0", "a1"]


def test_a_new_version_of_a_name_never_gives_the_old_weights():
    loader = Loader()
    cache = AdapterCache(loader)
    old, new = Entry("a1", f"{1:064x}", 1), Entry("a2", f"{2:064x}", 2)
    assert cache(old).digest == old.digest
    assert cache(new).digest == new.digest


def test_two_names_of_the_same_files_share_memory():
    loader = Loader()
    cache = AdapterCache(loader)
    twin = Entry("twin", make_entry(1).digest)
    assert cache(make_entry(1)) is cache(twin)
    assert loader.loads == ["a1"]


def test_stats_count_hits_misses_and_evictions():
    loader = Loader()
    loader.broken = {"a9"}
    cache = AdapterCache(loader, limit_bytes=2 * ONE)
    assert cache.stats() == CacheStats(0, 0, 0, 0, 0, 0, 0.0)
    for number in (0, 1, 1, 2, 0):
        cache(make_entry(number))
    with pytest.raises(StoreError):
        cache(make_entry(9))
    stats = cache.stats()
    assert (stats.resident, stats.size_bytes) == (2, 2 * ONE)
    assert (stats.hits, stats.misses, stats.failures, stats.evictions) == (1, 5, 1, 2)
    assert stats.load_seconds > 0


def test_held_adapters_are_not_evicted_until_they_are_released():
    loader = Loader()
    cache = AdapterCache(loader, limit_bytes=2 * ONE)
    with cache.hold([make_entry(n) for n in range(4)]) as adapters:
        assert [adapter.name for adapter in adapters] == ["a0", "a1", "a2", "a3"]
        assert cache.size_bytes == 4 * ONE
        cache(make_entry(4))
        assert cache.size_bytes == 5 * ONE
        cache(make_entry(5))
        assert cache.size_bytes == 5 * ONE, "held adapters stay, the others are evicted"
        assert [cache(make_entry(n)) is adapters[n] for n in range(4)] == [True] * 4
    assert cache.size_bytes == 2 * ONE
    assert len(loader.loads) == 6


def test_an_adapter_stays_until_its_last_holder_releases_it():
    cache = AdapterCache(Loader(), limit_bytes=ONE)
    outer = ExitStack()
    [held] = outer.enter_context(cache.hold([make_entry(1)]))
    with cache.hold([make_entry(1), make_entry(1), make_entry(2)]) as (first, second, _):
        assert first is second is held
    cache(make_entry(3))
    assert cache(make_entry(1)) is held
    outer.close()
    cache(make_entry(3))
    assert cache(make_entry(1)) is not held


def test_an_error_in_the_block_releases_the_adapters():
    cache = AdapterCache(Loader(), limit_bytes=ONE)
    with pytest.raises(ValueError, match="a bug"), cache.hold([make_entry(0), make_entry(1)]):
        raise ValueError("a bug")
    assert cache.size_bytes == ONE


def test_all_failed_loads_are_reported_together_and_nothing_stays_held():
    loader = Loader()
    loader.broken = {"a1", "a3"}
    cache = AdapterCache(loader, limit_bytes=ONE)
    with (
        pytest.raises(
            AdapterUnavailableError, match="a1 version 1: the store cannot be reached; a3 version 1"
        ) as info,
        cache.hold([make_entry(n) for n in range(4)]),
    ):
        raise AssertionError("never reached")
    failed = [(failure.name, failure.digest, failure.kind) for failure in info.value.failures]
    assert failed == [(e.name, e.digest, "unreachable") for e in (make_entry(1), make_entry(3))]
    assert isinstance(info.value.__cause__, StoreError)
    assert str(info.value.__cause__) == "a1: gone"
    assert cache.size_bytes == ONE, "what was loaded beside them is no longer held"
    loader.broken = set()
    with cache.hold([make_entry(n) for n in range(4)]) as adapters:
        assert len(adapters) == 4


def test_the_error_can_be_pickled():
    failure = AdapterFailure.from_error(make_entry(1), IntegrityError("other bytes"))
    error = AdapterUnavailableError([failure])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert "a1 version 1: stored bytes differ from their digest" in str(error)
    assert again.failures == (failure,)


def test_threads_that_need_the_same_adapter_load_it_once():
    loader = Loader()
    cache = AdapterCache(loader)
    # The load ends only when all the others have come and wait for it.
    loader.before["a1"] = lambda: wait_until(lambda: cache.stats().hits == 7)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(cache, [make_entry(1)] * 8))
    assert loader.loads == ["a1"]
    assert all(adapter is found[0] for adapter in found)


def test_different_adapters_are_loaded_in_parallel():
    loader = Loader()
    meeting = threading.Barrier(3, timeout=TIMEOUT_S)
    loader.before = dict.fromkeys(("a1", "a2", "a3"), meeting.wait)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(AdapterCache(loader), [make_entry(n) for n in (1, 2, 3)]))
    assert [adapter.name for adapter in found] == ["a1", "a2", "a3"]


def test_a_failed_load_raises_in_all_waiting_threads_and_keeps_nothing():
    loader = Loader()
    loader.broken = {"a1"}
    cache = AdapterCache(loader)
    loader.before["a1"] = lambda: wait_until(lambda: cache.stats().hits == 3)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(cache, make_entry(1)) for _ in range(4)]
        errors = [future.exception(TIMEOUT_S) for future in waiting]
    assert [str(error) for error in errors] == ["a1: gone"] * 4
    assert loader.loads == ["a1"]
    assert (len(cache), cache.size_bytes, cache.stats().failures) == (0, 0, 1)
    loader.broken.clear()
    loader.before.clear()
    assert cache(make_entry(1)).name == "a1"


def test_when_the_loading_thread_is_interrupted_another_takes_over():
    loader = Loader()
    cache = AdapterCache(loader)

    def interrupt():
        loader.before.clear()
        wait_until(lambda: cache.stats().hits == 1)
        raise KeyboardInterrupt

    loader.before["a1"] = interrupt
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache, make_entry(1))
        wait_until(lambda: loader.loads)
        second = threads.submit(cache, make_entry(1))
        assert isinstance(first.exception(TIMEOUT_S), KeyboardInterrupt)
        assert second.result(TIMEOUT_S).name == "a1"


def test_an_adapter_is_not_evicted_before_waiting_threads_have_it():
    loader = Loader()
    cache = AdapterCache(loader, limit_bytes=1)
    loader.before["a1"] = lambda: wait_until(lambda: cache.stats().hits == 1)
    with ThreadPoolExecutor(2) as threads:
        held = [threads.submit(_hold_and_yield, cache) for _ in range(2)]
        first, second = (future.result(TIMEOUT_S) for future in held)
    assert first is second
    assert loader.loads.count("a1") == 1


def _hold_and_yield(cache):
    with cache.hold([make_entry(1)]) as (adapter,):
        for number in range(2, 6):
            cache(make_entry(number))
        assert cache(make_entry(1)) is adapter
    return adapter


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_holds_keep_the_counters_consistent(seed):
    """Random holds in opposite orders, failing loads, a budget far too small for all of it."""
    loader = Loader()
    loader.broken = {"a11"}
    cache = AdapterCache(loader, limit_bytes=3 * ONE)
    failures = []

    def work(number):
        chance = random.Random(seed * 100 + number)
        asked = 0
        for _ in range(150):
            wanted = [make_entry(n) for n in chance.sample(range(12), chance.randint(1, 4))]
            asked += len(wanted)
            try:
                with cache.hold(wanted) as adapters:
                    assert [a.digest for a in adapters] == [e.digest for e in wanted]
                    again = chance.randrange(len(wanted))
                    asked += 1
                    assert cache(wanted[again]) is adapters[again]
                    assert cache.size_bytes >= len(wanted) * ONE
            except AdapterUnavailableError as error:
                failures.extend(failure.name for failure in error.failures)
        return asked

    with ThreadPoolExecutor(8) as threads:
        asked = sum(threads.map(work, range(8), timeout=TIMEOUT_S))
    stats = cache.stats()
    assert set(failures) == {"a11"}
    assert stats.hits + stats.misses == asked
    assert stats.misses == len(loader.loads)
    assert stats.resident == stats.misses - stats.failures - stats.evictions
    assert stats.size_bytes == stats.resident * ONE == 3 * ONE
