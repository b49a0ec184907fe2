"""Kill the server hard while writers are at work: what it acknowledged must be there."""

import concurrent.futures
import hashlib
import logging
import socket
import subprocess
import threading
import time
import urllib.parse

import pytest

from loraseg.errors import StoreError
from loraseg.seeding import numpy_generator
from loraseg.storage import RETRY_TIMEOUT_S, open_store

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.durable

WRITERS = 4
ROUNDS = 3


def test_no_acknowledged_write_is_lost(durable_env):
    restart = durable_env.endpoint.restart
    if not restart:
        pytest.skip("LORASEG_TEST_S3_RESTART does not say how to kill and restart the server")
    stop = threading.Event()
    written = [{} for _ in range(WRITERS)]
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        futures = [
            pool.submit(_write_until, stop, durable_env.uri, number, acknowledged)
            for number, acknowledged in enumerate(written)
        ]
        try:
            for _ in range(ROUNDS):
                _wait_for_more(written)
                assert _refused_during(restart, durable_env.endpoint.url), "it was never down"
            _wait_for_more(written)
        finally:
            stop.set()
        for future in futures:
            future.result()
    store = open_store(durable_env.uri)
    for digests in written:
        for key, digest in digests.items():
            assert hashlib.sha256(store.get(key)).hexdigest() == digest, key
    logger.info("%d acknowledged writes over %d kills, none lost", sum(map(len, written)), ROUNDS)


def _write_until(stop, uri, writer, acknowledged):
    """Write objects of 10 B to 1 MB in every way; note the digests of what was acknowledged."""
    store = open_store(uri)
    random = numpy_generator(0, "crash", writer)
    number = 0
    while not stop.is_set():
        number += 1
        key = f"{writer}/{number}"
        data = random.bytes(int(10 ** random.uniform(1, 6)))
        try:
            if number % 2:
                store.put(key, data)
            else:
                assert store.put_if_absent(key, data) is True
        except StoreError:
            continue
        acknowledged[key] = hashlib.sha256(data).hexdigest()


def _wait_for_more(written):
    """Wait until every writer has had two more writes acknowledged: one in each way."""
    goals = [len(acknowledged) + 2 for acknowledged in written]
    deadline = time.monotonic() + RETRY_TIMEOUT_S
    while any(len(one) < goal for one, goal in zip(written, goals, strict=True)):
        assert time.monotonic() < deadline, f"writes stand still at {list(map(len, written))}"
        time.sleep(0.02)


def _refused_during(restart, url):
    """Run the restart command; return whether the port was closed at some time."""
    address = urllib.parse.urlsplit(url)
    refused = False
    with subprocess.Popen(restart, shell=True, stdout=subprocess.DEVNULL) as command:
        while command.poll() is None:
            try:
                socket.create_connection((address.hostname, address.port), 1).close()
            except OSError:
                refused = True
            time.sleep(0.02)
    assert command.returncode == 0
    return refused
