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
    """What publishers use; the service has a store of its own."""
    return Library(open_store(str(tmp_path)))


@pytest.fixture
def store_and_live(tmp_path):
    store, library = switched_library(tmp_path)
    live = LibraryWatcher(library, name="main", adapter_filter=ADAPTER_FILTER, poll_s=0.02)
    yield store, live
    live.close()


@pytest.fixture
def store(store_and_live):
    return store_and_live[0]


@pytest.fixture
def live(store_and_live):
    return store_and_live[1]


def publish(library, name, content="weights"):
    return library.publish(name, make_files(content), make_card(name))


def served_names(live):
    return {ref.name: ref.version for ref in live.snapshot().pool.entries}


def make_failure(entry, kind="damaged"):
    return AdapterFailure(entry.name, entry.version, entry.digest, "words", kind)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_is_not_ready_before_the_first_generation_is_loaded(live, store):
    with pytest.raises(ServiceError, match="'main' is not ready: it is being loaded") as caught:
        live.snapshot()
    assert (caught.value.code, caught.value.retry_after_s) == ("not_ready", 2.0)
    store.is_on = False
    live.refresh()
    with pytest.raises(ServiceError, match=r"the store cannot be reached$"):
        live.snapshot()
    assert live.status().snapshot is None


def test_the_store_may_come_later(library, live, store):
    publish(library, "fog")
    store.is_on = False
    live.start()
    wait_until(lambda: live.status().problem)
    assert not live.wait(0.0)
    store.is_on = True
    assert live.wait(20.0)
    assert served_names(live) == {"fog": 1}
    wait_until(lambda: live.status().problem is None)


def test_what_is_published_and_rolled_back_is_seen_by_itself(library, live):
    live.start()
    assert live.wait(20.0)
    assert served_names(live) == {}
    publish(library, "fog", "first")
    wait_until(lambda: served_names(live) == {"fog": 1})
    publish(library, "fog", "second")
    publish(library, "rain")
    wait_until(lambda: served_names(live) == {"fog": 2, "rain": 1})
    library.rollback("fog", 1)
    wait_until(lambda: served_names(live) == {"fog": 1, "rain": 1})
    assert live.snapshot().generation == library.generation() == 4


def test_a_generation_in_use_never_changes(library, live):
    publish(library, "fog")
    before = live.refresh().snapshot
    publish(library, "rain")
    after = live.refresh().snapshot
    assert [ref.name for ref in before.pool.entries] == ["fog"]
    assert [ref.name for ref in after.pool.entries] == ["fog", "rain"]


def test_a_look_at_an_unchanged_library_reads_only_its_head(library, live, store):
    publish(library, "fog")
    live.refresh()
    store.read.clear()
    live.refresh()
    assert store.read == [HEAD_KEY]


def test_a_store_that_goes_away_leaves_what_is_loaded_and_is_reported(library, live, store):
    publish(library, "fog")
    checked_at = live.refresh().checked_at
    store.is_on = False
    status = live.refresh()
    assert status.problem == "the store cannot be reached"
    assert status.checked_at == checked_at
    assert served_names(live) == {"fog": 1}
    store.is_on = True
    status = live.refresh()
    assert status.problem is None
    assert status.checked_at > checked_at


@pytest.mark.parametrize("damage", [b"nonsense", b"", None])
def test_a_damaged_generation_keeps_the_one_before_and_is_reported(library, live, tmp_path, damage):
    publish(library, "fog")
    live.refresh()
    publish(library, "rain")
    path = tmp_path / snapshot_key(2)
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    status = live.refresh()
    assert status.problem == "the newest catalog is missing or damaged"
    assert status.snapshot.generation == 1
    path.write_bytes(whole)
    status = live.refresh()
    assert (status.problem, status.snapshot.generation) == (None, 2)


def test_a_damaged_generation_is_not_read_at_every_look(library, live, store, tmp_path):
    publish(library, "fog")
    (tmp_path / snapshot_key(1)).write_bytes(b"nonsense")
    live.start()
    wait_until(lambda: store.read.count(HEAD_KEY) > 5)
    assert store.read.count(snapshot_key(1)) == 1
    assert live.status().problem == "the newest catalog is missing or damaged"


def test_one_that_replaces_a_damaged_generation_is_taken_at_once(library, live, tmp_path):
    publish(library, "fog")
    live.start()
    assert live.wait(20.0)
    publish(library, "rain")
    (tmp_path / snapshot_key(2)).write_bytes(b"nonsense")
    publish(library, "night")  # knows the generation from memory
    wait_until(lambda: "night" in served_names(live))


@pytest.mark.parametrize("head", [b"nonsense", b"", None])
def test_a_head_that_is_damaged_or_gone_keeps_the_generation(library, live, tmp_path, head):
    publish(library, "fog")
    live.refresh()
    (tmp_path / HEAD_KEY).unlink()
    if head is not None:
        (tmp_path / HEAD_KEY).write_bytes(head)
    status = live.refresh()
    assert status.problem == "the newest catalog is missing or damaged"
    assert served_names(live) == {"fog": 1}


def test_an_adapter_set_aside_is_out_of_service_for_a_while(library, live, monkeypatch):
    entry = publish(library, "fog")
    live.refresh()
    monkeypatch.setattr(LibraryWatcher, "BROKEN_QUARANTINE_S", 0.2)
    failure = make_failure(entry)
    live.quarantine(failure)
    assert live.status().quarantined == (failure,)
    wait_until(lambda: live.status().quarantined == ())
    assert live._quarantine == {}


def test_a_store_out_of_reach_takes_adapters_out_for_a_shorter_time(library, live, monkeypatch):
    assert LibraryWatcher.UNREACHABLE_QUARANTINE_S < LibraryWatcher.BROKEN_QUARANTINE_S
    monkeypatch.setattr(LibraryWatcher, "UNREACHABLE_QUARANTINE_S", 0.05)
    fog, rain = publish(library, "fog"), publish(library, "rain")
    live.refresh()
    live.quarantine(make_failure(fog))
    live.quarantine(make_failure(rain, "unreachable"))
    wait_until(lambda: [f.name for f in live.status().quarantined] == ["fog"])


def test_only_the_version_that_failed_is_set_aside(library, live):
    publish(library, "fog", "first")
    second = publish(library, "fog", "second")
    live.refresh()
    live.quarantine(make_failure(second))
    library.rollback("fog", 1)
    assert [f.name for f in live.quarantined(live.snapshot())] == ["fog"]
    live._poll_once()
    assert live.status().quarantined == ()


def test_refreshing_tries_anew_what_was_set_aside(library, live):
    entry = publish(library, "fog")
    live.refresh()
    live.quarantine(make_failure(entry))
    assert live.refresh().quarantined == ()


def test_setting_aside_from_many_threads_loses_none(library, live):
    entries = [publish(library, f"domain{index}") for index in range(8)]
    live.refresh()

    def work(entry):
        for _ in range(200):
            live.quarantine(make_failure(entry))
            live.quarantined(live.snapshot())

    threads = [threading.Thread(target=work, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(live.status().quarantined) == 8
