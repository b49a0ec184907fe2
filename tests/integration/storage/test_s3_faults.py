"""Network faults between client and S3 server, and their messages."""

import logging
import multiprocessing
import socket

import pytest

import loraseg.storage.s3 as s3
from loraseg.errors import StoreError
from loraseg.storage import ObjectNotFoundError, open_store, probe_conditional_writes
from tests.integration.storage.faulty_server import FaultyServer

SECRET = "s3cr3t-that-must-not-be-shown"


@pytest.fixture
def faulty(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    # Retries wait random times; this keeps the file quick, not the retries away.
    monkeypatch.setattr("loraseg.storage.retry.backoff_s", lambda attempt, first, longest: 0.01)
    with FaultyServer().running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def store(faulty):
    return open_store("s3://bucket/prefix")


@pytest.mark.parametrize(
    "faults", [[503, 503], [500, 429], ["drop"], ["lose"], ["drop", 503, "lose"]]
)
def test_passing_faults_are_retried(faulty, store, faults):
    faulty.faults = list(faults)
    store.put("key", b"data")
    faulty.faults = [*faults, "cut", "cut"]
    assert store.get("key") == b"data"


@pytest.mark.parametrize("fault", ["lose", 500, 503])
def test_own_write_is_recognised_after_a_lost_answer(faulty, store, fault):
    faulty.faults = [fault]
    assert store.put_if_absent("key", b"first") is True
    etag = store.get_with_etag("key")[1]
    faulty.faults = [fault]
    assert store.put_if_match("key", b"second", etag) is True
    assert store.get("key") == b"second"


def test_same_bytes_of_another_writer_are_not_taken_for_own(faulty, store):
    store.put_if_absent("key", b"same")
    faulty.faults = ["drop"]
    assert store.put_if_absent("key", b"same") is False
    etag = store.get_with_etag("key")[1]
    store.put("key", b"next")
    faulty.faults = [503]
    assert store.put_if_match("key", b"next", etag) is False


def test_conflict_answers_are_tried_again(faulty, store):
    faulty.faults = [409, 409]
    assert store.put_if_absent("key", b"data") is True


def test_damage_on_the_way_is_refused(store, monkeypatch):
    monkeypatch.setattr(s3, "_content_md5", lambda data: "AAAAAAAAAAAAAAAAAAAAAA==")
    with pytest.raises(StoreError, match=r"cannot write 'key' in s3://bucket/prefix.*BadDigest"):
        store.with_retry_timeout(0.5).put("key", b"data")


def test_lasting_failure_says_where(faulty, store, caplog):
    faulty.faults = [503] * 1000
    with pytest.raises(StoreError, match=r"cannot write 'key' .* at http://127.0.0.1:.*SlowDown"):
        store.with_retry_timeout(0.5).put("key", b"data")
    assert 10 < len(faulty.seen) <= 51, "as often as pauses of 0.01 s allow"


def test_a_long_wait_is_logged_once(faulty, store, caplog, monkeypatch):
    monkeypatch.setattr("loraseg.storage.retry._WARN_AFTER_S", 0.1)
    faulty.faults = ["drop"] * 30
    store.put("key", b"data")
    (line,) = caplog.messages
    assert line.startswith("s3://bucket/prefix: write 'key': failed (ConnectionClosedError")


def test_refusals_are_not_repeated(faulty, store):
    faulty.faults = [400]
    with pytest.raises(StoreError, match="cannot write 'key'"):
        store.put("key", b"data")
    assert len(faulty.seen) == 1


def test_endless_truncation_is_an_error(faulty, store):
    store.put("key", b"data")
    faulty.faults = ["cut"] * 1000
    with pytest.raises(StoreError, match="cannot read 'key'"):
        store.with_retry_timeout(0.5).get("key")


def test_unreachable_endpoint(faulty, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
    store = open_store("s3://bucket").with_retry_timeout(0.2)
    with pytest.raises(StoreError, match=f"at http://127.0.0.1:{port}: no usable answer") as info:
        store.get("key")
    assert SECRET not in str(info.value)


@pytest.mark.parametrize(
    ("ignored", "message"),
    [("If-None-Match", "ignores If-None-Match"), ("If-Match", "ignores If-Match")],
)
def test_probe_names_what_a_store_ignores(faulty, store, ignored, message):
    work = faulty._put

    def forgetful(request, body, data):
        del request.headers[ignored]
        return work(request, body, data)

    faulty._put = forgetful
    with pytest.raises(StoreError, match=f"{message}.*use a store with conditional PutObject"):
        probe_conditional_writes(store)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own(faulty, store):
    """On a shared one, parent and child would read each other's answers."""
    store.put("key", b"data")
    below = open_store("s3://bucket").with_prefix("prefix")
    assert (store.get("key"), below.get("key")) == (b"data", b"data")
    parents = {request.client_address for request in faulty.seen}
    assert len(parents) == 2  # the server keeps connections alive, and each store has one
    for opened in (store, below, below.with_retry_timeout(1.0)):
        faulty.seen.clear()
        child = multiprocessing.get_context("fork").Process(target=opened.get, args=("key",))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert len(faulty.seen) == 1
        assert faulty.seen[0].client_address not in parents
    faulty.seen.clear()
    assert (store.get("key"), below.get("key")) == (b"data", b"data")
    assert {request.client_address for request in faulty.seen} == parents


def test_missing_credentials(faulty, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket").get("key")


def test_missing_bucket(s3_env):
    store = open_store("s3://no-such-bucket-here")
    for operation in (
        lambda: store.get("key"),
        lambda: store.put("key", b""),
        lambda: store.put_if_absent("key", b""),
        lambda: store.put_if_match("key", b"", "0" * 32),
        lambda: store.exists("key"),
        lambda: list(store.list()),
    ):
        with pytest.raises(StoreError, match="the bucket does not exist; create it") as info:
            operation()
        assert not isinstance(info.value, ObjectNotFoundError)


@pytest.mark.durable
def test_wrong_secret(durable_env, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = open_store(durable_env.uri)
    caplog.set_level(logging.DEBUG, "loraseg")
    for operation in (lambda: store.get("key"), lambda: store.put("key", b"")):
        with pytest.raises(StoreError, match="refused the credentials") as info:
            operation()
        assert SECRET not in str(info.value) + caplog.text
