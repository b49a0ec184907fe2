"""The S3 store behind the flaky proxy, one scripted fault at a time."""

import threading

import pytest

import loraseg.storage.s3 as s3
from loraseg.storage import open_store
from tests.integration.faults.flaky_proxy import FAULTS, FlakyProxy


@pytest.fixture(params=["moto", pytest.param("durable", marks=pytest.mark.durable)])
def proxy(request, monkeypatch):
    environment = request.getfixturevalue("s3_env" if request.param == "moto" else "durable_env")
    with FlakyProxy(environment.endpoint.url).running() as proxy:
        proxy.delay_s = 0.1
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.store = open_store(f"{environment.uri}/prefix")
        yield proxy


def test_the_server_accepts_signatures_for_the_proxys_address(proxy):
    assert proxy.store.put_if_absent("key", b"data")
    assert proxy.store.get("key") == b"data"
    assert proxy.counts["requests"] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_survives_each_fault(proxy, fault):
    store = proxy.store
    calls = [
        lambda: store.put("key", b"data"),
        lambda: store.get("key"),
        lambda: store.put_if_absent("new", b"data"),
        lambda: store.put_if_absent("new", b"data"),
        lambda: store.put_if_match("key", b"next", store.get_with_etag("key")[1]),
        lambda: store.exists("key"),
        lambda: store.exists("none"),
        lambda: list(store.list()),
        lambda: store.delete("key"),
    ]
    results = []
    for call in calls:
        proxy.faults = [fault]
        results.append(call())
    assert results[1:] == [b"data", True, False, True, True, False, ["key", "new"], None]


def test_a_closed_port_is_retried(proxy):
    outage = proxy.outage()
    outage.__enter__()
    threading.Timer(1.0, outage.__exit__, (None, None, None)).start()
    proxy.store.put("key", b"data")
    assert proxy.store.get("key") == b"data"


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("fault", ["lose", "fail", "drop", "cut"])
def test_each_request_of_a_multipart_upload_may_fail(proxy, monkeypatch, fault, number):
    monkeypatch.setattr(s3, "MULTIPART_THRESHOLD_BYTES", 2**20)
    monkeypatch.setattr(s3, "_PART_THREADS", 1)
    data = bytes(s3.PART_BYTES) + b"last part"
    # Requests: create, two parts, complete, look up.
    proxy.faults = [None] * number + [fault]
    etag = proxy.store.put("key", data)
    assert proxy.store.get_with_etag("key") == (data, etag)
    assert any(name.startswith(fault) for name in proxy.counts)
