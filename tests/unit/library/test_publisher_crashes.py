"""A publisher dies at each of its steps in turn; other publishers continue."""

import pytest

from loraseg.library import Library
from loraseg.storage import LocalStore
from tests.unit.library.sample_adapters import make_card, make_files

# After the four writes of the probe: two blobs, the record, the snapshot and HEAD.
FIRST_STEP, LAST_STEP = 5, 9
WRITES = ("put", "put_if_absent", "put_if_match")


class SimulatedCrash(BaseException):
    """Not an Exception: nothing may handle it, as nothing handles SIGKILL."""


class CrashingStore(LocalStore):
    """Dies before or after its n-th write."""

    def __init__(self, root, crash_at, *, before):
        super().__init__(root)
        self._left = crash_at
        self._before = before

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        return method if name not in WRITES else lambda *a: self._maybe_crash(method, *a)

    def _maybe_crash(self, method, *arguments):
        self._left -= 1
        if self._left == 0 and self._before:
            raise SimulatedCrash
        result = method(*arguments)
        if self._left == 0:
            raise SimulatedCrash
        return result


def publish(store, name, content):
    return Library(store).publish(name, make_files(content), make_card(name))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", range(FIRST_STEP, LAST_STEP + 2))
@pytest.mark.parametrize("is_first", [True, False])
def test_others_go_on_and_it_can_be_repeated(tmp_path, step, before, is_first):
    store = LocalStore(tmp_path)
    if not is_first:
        publish(store, "early", "early")
    early = set() if is_first else {"early"}
    died = False
    try:
        publish(CrashingStore(tmp_path, step, before=before), "fog", "fog")
    except SimulatedCrash:
        died = True
    assert died is (step <= LAST_STEP)
    if died:
        assert {entry.name for entry in Library(store).entries()} in (early, early | {"fog"})
    publish(store, "rain", "rain")
    assert {entry.name for entry in Library(store).entries()} >= early | {"rain"}
    assert publish(store, "fog", "fog").version == 1, "what it reserved is taken over"
    library = Library(store)
    assert {entry.name for entry in library.entries()} == early | {"fog", "rain"}
    assert library.load("fog")[0] == make_files("fog")
    report = library.verify()
    assert report.ok
    assert all(key.startswith("probe/") for key in report.garbage)


def test_garbage_is_listed(tmp_path):
    store = LocalStore(tmp_path)
    publish(store, "fog", "fog")
    strays = [
        "adapters/fog/9.json",
        "blobs/sha256/00/stray",
        "catalog/00000009.parquet",
        "catalog/notes",
    ]
    for key in strays:
        store.put(key, b"stray")
    store.put("checkpoints/other", b"not the library's")
    # Might be a commit whose writer has not swapped HEAD yet.
    store.put("catalog/00000002.parquet", b"next")
    report = Library(store).verify()
    assert report.ok
    assert report.garbage == tuple(strays)
