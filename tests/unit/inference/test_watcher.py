import threading
import time

import pytest

from loraseg.errors import ServiceError
from loraseg.inference.adapter_ref import AdapterFailure
from loraseg.inference.snapshot import AdapterFilter
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library import Library
from loraseg.library.records import HEAD_KEY, snapshot_key
from loraseg.storage import open_store
from tests.unit.inference.tiny_service import switched_library
from tests.unit.library.sample_adapters import BASE, make_card, make_files

ADAPTER_FILTER = AdapterFilter(base_digest=BASE.digest, encoder_id="clip")


@pytest.fixture
def library(tmp_path):
    """The library of the publishers; the watcher has its own store."""
    return Library(open_store(str(tmp_path)))


@pytest.fixture
def store_and_watcher(tmp_path):
    store, library = switched_library(tmp_path)
    watcher = LibraryWatcher(library, name="main", adapter_filter=ADAPTER_FILTER, poll_s=0.02)
    yield store, watcher
    watcher.close()


@pytest.fixture
def store(store_and_watcher):
    return store_and_watcher[0]


@pytest.fixture
def watcher(store_and_watcher):
    return store_and_watcher[1]


def publish(library, name, content="weights"):
    return library.publish(name, make_files(content), make_card(name))


def served_names(watcher):
    return {ref.name: ref.version for ref in watcher.snapshot().pool.entries}


def make_failure(entry, kind="damaged"):
    return AdapterFailure(entry.name, entry.version, entry.digest, "words", kind)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_is_not_ready_before_the_first_generation_is_loaded(watcher, store):
    with pytest.raises(ServiceError, match="'main' is not ready: it is being loaded") as caught:
        watcher.snapshot()
    assert (caught.value.code, caught.value.retry_after_s) == ("not_ready", 2.0)
    store.is_on = False
    watcher.refresh()
    with pytest.raises(ServiceError, match=r"the store cannot be reached$"):
        watcher.snapshot()
    assert watcher.status().snapshot is None


def test_a_store_that_is_down_at_the_start_is_read_later(library, watcher, store):
    publish(library, "fog")
    store.is_on = False
    watcher.start()
    wait_until(lambda: watcher.status().problem)
    assert not watcher.wait(0.0)
    store.is_on = True
    assert watcher.wait(20.0)
    assert served_names(watcher) == {"fog": 1}
    wait_until(lambda: watcher.status().problem is None)


def test_publishing_and_rollback_are_noticed(library, watcher):
    watcher.start()
    assert watcher.wait(20.0)
    assert served_names(watcher) == {}
    publish(library, "fog", "first")
    wait_until(lambda: served_names(watcher) == {"fog": 1})
    publish(library, "fog", "second")
    publish(library, "rain")
    wait_until(lambda: served_names(watcher) == {"fog": 2, "rain": 1})
    library.rollback("fog", 1)
    wait_until(lambda: served_names(watcher) == {"fog": 1, "rain": 1})
    assert watcher.snapshot().generation == library.generation() == 4


def test_a_snapshot_never_changes(library, watcher):
    publish(library, "fog")
    before = watcher.refresh().snapshot
    publish(library, "rain")
    after = watcher.refresh().snapshot
    assert [ref.name for ref in before.pool.entries] == ["fog"]
    assert [ref.name for ref in after.pool.entries] == ["fog", "rain"]


def test_a_check_of_an_unchanged_library_reads_only_its_head(library, watcher, store):
    publish(library, "fog")
    watcher.refresh()
    store.read.clear()
    watcher.refresh()
    assert store.read == [HEAD_KEY]


def test_an_unreachable_store_is_reported_and_the_snapshot_stays(library, watcher, store):
    publish(library, "fog")
    checked_at = watcher.refresh().checked_at
    store.is_on = False
    status = watcher.refresh()
    assert status.problem == "the store cannot be reached"
    assert status.checked_at == checked_at
    assert served_names(watcher) == {"fog": 1}
    store.is_on = True
    status = watcher.refresh()
    assert status.problem is None
    assert status.checked_at > checked_at


@pytest.mark.parametrize("damage", [b"nonsense", b"", None])
def test_a_damaged_generation_is_reported_and_the_previous_one_stays(
    library, watcher, tmp_path, damage
):
    publish(library, "fog")
    watcher.refresh()
    publish(library, "rain")
    path = tmp_path / snapshot_key(2)
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    status = watcher.refresh()
    assert status.problem == "the newest catalog is missing or damaged"
    assert status.snapshot.generation == 1
    path.write_bytes(whole)
    status = watcher.refresh()
    assert (status.problem, status.snapshot.generation) == (None, 2)


def test_a_damaged_generation_is_not_read_at_every_check(library, watcher, store, tmp_path):
    publish(library, "fog")
    (tmp_path / snapshot_key(1)).write_bytes(b"nonsense")
    watcher.start()
    wait_until(lambda: store.read.count(HEAD_KEY) > 5)
    assert store.read.count(snapshot_key(1)) == 1
    assert watcher.status().problem == "the newest catalog is missing or damaged"


def test_the_successor_of_a_damaged_generation_is_loaded_at_once(library, watcher, tmp_path):
    publish(library, "fog")
    watcher.start()
    assert watcher.wait(20.0)
    publish(library, "rain")
    (tmp_path / snapshot_key(2)).write_bytes(b"nonsense")
    publish(library, "night")  # does not read the damaged generation
    wait_until(lambda: "night" in served_names(watcher))


@pytest.mark.parametrize("head", [b"nonsense", b"", None])
def test_a_damaged_or_missing_head_keeps_the_generation(library, watcher, tmp_path, head):
    publish(library, "fog")
    watcher.refresh()
    (tmp_path / HEAD_KEY).unlink()
    if head is not None:
        (tmp_path / HEAD_KEY).write_bytes(head)
    status = watcher.refresh()
    assert status.problem == "the newest catalog is missing or damaged"
    assert served_names(watcher) == {"fog": 1}


def test_a_quarantined_adapter_returns_after_a_time(library, watcher, monkeypatch):
    entry = publish(library, "fog")
    watcher.refresh()
    monkeypatch.setattr(LibraryWatcher, "BROKEN_QUARANTINE_S", 0.2)
    failure = make_failure(entry)
    watcher.quarantine(failure)
    assert watcher.status().quarantined == (failure,)
    wait_until(lambda: watcher.status().quarantined == ())
    assert watcher._quarantine == {}


def test_the_quarantine_for_an_unreachable_store_is_shorter(library, watcher, monkeypatch):
    assert LibraryWatcher.UNREACHABLE_QUARANTINE_S < LibraryWatcher.BROKEN_QUARANTINE_S
    monkeypatch.setattr(LibraryWatcher, "UNREACHABLE_QUARANTINE_S", 0.05)
    fog, rain = publish(library, "fog"), publish(library, "rain")
    watcher.refresh()
    watcher.quarantine(make_failure(fog))
    watcher.quarantine(make_failure(rain, "unreachable"))
    wait_until(lambda: [f.name for f in watcher.status().quarantined] == ["fog"])


def test_only_the_failed_version_is_quarantined(library, watcher):
    publish(library, "fog", "first")
    second = publish(library, "fog", "second")
    watcher.refresh()
    watcher.quarantine(make_failure(second))
    library.rollback("fog", 1)
    assert [f.name for f in watcher.quarantined(watcher.snapshot())] == ["fog"]
    watcher._poll_once()
    assert watcher.status().quarantined == ()


def test_refreshing_ends_the_quarantine(library, watcher):
    entry = publish(library, "fog")
    watcher.refresh()
    watcher.quarantine(make_failure(entry))
    assert watcher.refresh().quarantined == ()


def test_quarantine_from_many_threads_loses_none(library, watcher):
    entries = [publish(library, f"domain{index}") for index in range(8)]
    watcher.refresh()

    def work(entry):
        for _ in range(200):
            watcher.quarantine(make_failure(entry))
            watcher.quarantined(watcher.snapshot())

    threads = [threading.Thread(target=work, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(watcher.status().quarantined) == 8
