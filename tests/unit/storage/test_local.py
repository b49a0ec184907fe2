import errno
import fcntl
import os
import pathlib

import pytest

from loraseg.errors import StoreError
from loraseg.storage import LocalStore, local


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "root")


def files_below(path):
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def test_nothing_is_created_before_the_first_write(store, tmp_path):
    assert list(store.list()) == []
    assert not store.exists("key")
    store.delete("key")
    assert store.put_if_match("key", b"", "etag") is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", ["put", "put_if_absent"])
def test_a_write_that_fails_leaves_no_trace(store, monkeypatch, write):
    store.put("other", b"data")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write 'key' in file://.*: No space left"):
        getattr(store, write)("key", b"data")
    assert not store.exists("key")
    assert files_below(pathlib.Path(store._root)) == [".loraseg-lock", "other"]


def test_leftovers_of_a_killed_writer_are_not_objects(store):
    store.put("folder/key", b"data")
    (store._root / "folder" / ".loraseg-tmp-dead").write_bytes(b"half")
    assert list(store.list()) == ["folder/key"]


def test_data_is_flushed_before_it_is_linked(store, monkeypatch):
    events = []
    fsync, replace, link = os.fsync, pathlib.Path.replace, pathlib.Path.hardlink_to
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), fsync(fd))[1])
    monkeypatch.setattr(
        pathlib.Path, "replace", lambda s, t: (events.append("rename"), replace(s, t))[1]
    )
    monkeypatch.setattr(
        pathlib.Path, "hardlink_to", lambda s, t: (events.append("link"), link(s, t))[1]
    )
    store.put("a", b"")
    store.put_if_absent("b", b"")
    # The first flush is that of the new root's parent; after each move its folder is flushed.
    assert events == ["flush", "flush", "rename", "flush", "flush", "link", "flush"]


def test_put_if_absent_without_hard_links(store, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(pathlib.Path, "hardlink_to", refuse)
    assert store.put_if_absent("key", b"first") is True
    assert store.put_if_absent("key", b"second") is False
    assert store.get("key") == b"first"
    assert files_below(store._root) == [".loraseg-lock", "key"]


def test_a_lock_that_is_never_released_is_reported(store, monkeypatch):
    store.put("key", b"data")
    monkeypatch.setattr(local, "_LOCK_TIMEOUT_S", 0.05)
    with (store._root / ".loraseg-lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"\.loraseg-lock has been locked for"):
            store.put("key", b"more")
    assert store.get("key") == b"data"


def test_unreadable_folder_names_the_key(store):
    store.put("key", b"data")
    store._root.joinpath("loop").symlink_to("loop")
    with pytest.raises(StoreError, match="cannot read 'loop' in file://"):
        store.get("loop")


def test_stores_with_a_prefix_share_the_lock(store):
    store.put("a/b/key", b"data")
    etag = store.get_with_etag("a/b/key")[1]
    assert store.with_prefix("a").with_prefix("b").put_if_match("key", b"new", etag) is True
    assert files_below(store._root) == [".loraseg-lock", "key"]
