"""What every store must do; also a user's check of a store of their own (see conftest.py)."""

import concurrent.futures

import pytest

from loraseg.errors import LorasegError, StoreError
from loraseg.storage import ObjectNotFoundError, open_store, probe_conditional_writes


@pytest.fixture
def store(store_uri):
    return open_store(store_uri)


@pytest.mark.parametrize("data", [b"", b"\x00", bytes(range(256)) * 4096], ids=len)
def test_bytes_come_back(store, data):
    etag = store.put("some/key", data)
    assert store.get("some/key") == data
    assert store.get_with_etag("some/key") == (data, etag)


def test_put_replaces_and_changes_the_etag(store):
    first = store.put("key", b"first")
    second = store.put("key", b"second")
    assert first != second
    assert store.get_with_etag("key") == (b"second", second)


def test_missing_object(store):
    assert not store.exists("no/such")
    with pytest.raises(ObjectNotFoundError, match="no object 'no/such' in"):
        store.get("no/such")
    with pytest.raises(LorasegError, match="no object"):
        store.get_with_etag("no/such")
    store.delete("no/such")


def test_put_if_absent_keeps_the_first(store):
    assert store.put_if_absent("deep/key", b"first") is True
    assert store.put_if_absent("deep/key", b"second") is False
    assert store.put_if_absent("deep/key", b"first") is False
    assert store.get("deep/key") == b"first"


def test_put_if_match_compares(store):
    etag = store.put("key", b"first")
    assert store.put_if_match("key", b"second", etag) is True
    assert store.put_if_match("key", b"third", etag) is False
    assert store.get("key") == b"second"
    assert store.put_if_match("key", b"third", store.get_with_etag("key")[1]) is True
    assert store.put_if_match("absent", b"data", etag) is False
    assert not store.exists("absent")


def test_delete_makes_room(store):
    store.put("key", b"first")
    store.delete("key")
    store.delete("key")
    assert not store.exists("key")
    assert store.put_if_absent("key", b"second") is True


def test_list_orders_whole_keys(store):
    # "-" < "." < "/" < "0": folders must not be sorted by their bare names.
    keys = ["a-b", "a.b", "a/b", "a/b-c", "a/c/d", "a0", "b", "é/ü"]
    for key in reversed(keys):
        store.put(key, b"")
    assert list(store.list()) == keys
    assert list(store.list("a")) == keys[:6]
    assert list(store.list("a/")) == keys[2:5]
    assert list(store.list("a/b")) == keys[2:4]
    assert list(store.list("a/c")) == ["a/c/d"]
    assert list(store.list("c")) == []
    assert list(store.list("no/such/folder")) == []


def test_listed_objects_have_sizes_and_true_etags_only(store):
    etags = {key: store.put(key, b"x" * size) for size, key in enumerate(["a", "b/c", "b/d"])}
    sizes = {item.key: item.size_bytes for item in store.list_objects()}
    assert sizes == {"a": 0, "b/c": 1, "b/d": 2}
    assert [item.key for item in store.list_objects("b/")] == ["b/c", "b/d"]
    assert all(item.etag in (None, etags[item.key]) for item in store.list_objects())


def test_list_pages(store):
    keys = [f"page/{number:04d}" for number in range(1200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert list(store.list("page/")) == keys


@pytest.mark.parametrize(
    "key", ["with blank", "per%20cent", "plus+", "a?b#c&d=e", "ü/日本", "~a!b"]
)
def test_unusual_keys(store, key):
    store.put(key, key.encode())
    assert store.get(key) == key.encode()
    assert store.exists(key)
    assert list(store.list()) == [key]
    store.delete(key)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "key",
    [
        *("", "/abs", "a//b", "a/", "../up", "a/../b", ".", "a/./b"),
        *("nul\0", "line\n", "back\\slash", "\ud800"),
        *(".loraseg-tmp-1", "a/.loraseg-lock", "x" * 201, "x/" * 450 + "x"),
    ],
    ids=ascii,
)
def test_hostile_keys_are_refused(store, key):
    for operation in (store.get, store.exists, store.delete, store.with_prefix):
        with pytest.raises(StoreError, match="object key"):
            operation(key)
    with pytest.raises(StoreError, match="object key"):
        store.put(key, b"")
    with pytest.raises(StoreError, match="object key"):
        store.put_if_absent(key, b"")


@pytest.mark.parametrize("prefix", ["/abs", "../up", "a/../", "nul\0"], ids=ascii)
def test_hostile_prefixes_are_refused(store, prefix):
    with pytest.raises(StoreError, match="object key"):
        list(store.list(prefix))


@pytest.mark.parametrize(("first", "second"), [("x", "x/y"), ("x/y", "x"), ("x/y/z", "x/y")])
def test_a_key_and_one_below_it(store, store_uri, first, second):
    store.put(first, b"first")
    if store_uri.startswith("s3://"):
        store.put(second, b"second")
        assert store.get(second) == b"second"
    else:
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StoreError, match="both a file and a folder"):
                put(second, b"second")
        assert not store.exists(second)
        with pytest.raises(ObjectNotFoundError):
            store.get(second)
    assert store.get(first) == b"first"


def test_sub_is_the_same_store_below_a_prefix(store):
    below = store.with_prefix("one").with_prefix("two")
    below.put("key", b"data")
    store.put("one/twofold", b"")
    assert store.get("one/two/key") == b"data"
    assert list(below.list()) == ["key"]
    assert below.uri == f"{store.uri}/one/two"


def test_uri_opens_the_same_store(store):
    store.put("key", b"data")
    assert open_store(store.uri).get("key") == b"data"
    assert open_store(store.uri).uri == store.uri


def test_large_object(store):
    data = bytes(range(251)) * (20 * 2**20 // 251)
    etag = store.put("large", data)
    found, found_etag = store.get_with_etag("large")
    assert found == data
    assert found_etag == etag
    assert store.put_if_match("large", b"small", etag) is True
    assert store.put_if_absent("large", data) is False
    assert store.put_if_absent("large once", data) is True
    assert store.get("large once") == data


def test_probe_accepts_the_store_and_leaves_nothing(store):
    probe_conditional_writes(store)
    assert list(store.list()) == []
