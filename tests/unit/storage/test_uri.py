import pytest

from loraseg.errors import ConfigError, StoreError
from loraseg.storage import LocalStore, open_store, probe_conditional_writes


def test_paths_and_file_uris_mean_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "with blank"
    open_store(str(folder)).put("key", b"data")
    monkeypatch.chdir(tmp_path)
    for uri in ("with blank", f"file://{tmp_path}/with%20blank", folder.as_uri()):
        assert open_store(uri).get("key") == b"data"
        assert open_store(uri).uri == folder.as_uri()


def test_a_relative_path_stays_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("here")
    monkeypatch.chdir("/")
    store.put("key", b"")
    assert (tmp_path / "here" / "key").is_file()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "store URI is empty"),
        ("gs://bucket", "kind 'gs'; known kinds: a path, file:///folder, s3://bucket/prefix"),
        ("file://host/folder", "expected file:///absolute/folder"),
        ("file://", "expected file:///absolute/folder"),
        ("s3:/bucket/prefix", "did you mean s3://'bucket/prefix'"),
        ("s3://", "expected s3://bucket/prefix"),
        ("s3:///prefix", "expected s3://bucket/prefix"),
        ("s3://AKIA:secret@bucket/prefix", "credentials belong into AWS_ACCESS_KEY_ID"),
    ],
)
def test_malformed_uris(uri, message):
    with pytest.raises(ConfigError, match=message) as info:
        open_store(uri)
    assert "secret@" not in str(info.value)


def test_hostile_prefix_of_a_bucket():
    with pytest.raises(StoreError, match="object key"):
        open_store("s3://bucket/a/../b")


class NonConformingStore(LocalStore):
    """Fails its promise in one way."""

    def __init__(self, root, fault):
        super().__init__(root)
        self._lie = fault

    def put_if_absent(self, key, data):
        if self._lie == "overwrites":
            self.put(key, data)
            return True
        if self._lie == "refuses":
            return False
        won = super().put_if_absent(key, data)
        if not won and self._lie == "changes":
            self.put(key, data)
        return won

    def put_if_match(self, key, data, etag):
        if self._lie == "replaces":
            self.put(key, data)
            return True
        if self._lie == "never matches":
            return False
        return super().put_if_match(key, data, etag)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("overwrites", "ignores If-None-Match"),
        ("refuses", "never written"),
        ("changes", "changed an object although"),
        ("replaces", "ignores If-Match"),
        ("never matches", "rejects If-Match on PutObject even with the right etag"),
    ],
)
def test_probe_finds_every_lie_and_tidies_up(tmp_path, lie, message):
    store = NonConformingStore(tmp_path, lie)
    with pytest.raises(StoreError, match=message):
        probe_conditional_writes(store)
    assert list(store.list()) == []
