"""What racing processes do; in a module of its own so that they need not import pytest."""

from loraseg.storage import open_store

_barrier = None


def set_barrier(barrier):
    global _barrier
    _barrier = barrier


def create_all(uri, worker, rounds):
    """Race for ``rounds`` keys; return those won."""
    store = open_store(uri)
    won = []
    for number in range(rounds):
        _barrier.wait(60)
        if store.put_if_absent(f"race/{number}", f"{worker}".encode()):
            won.append(number)
    return won


def count_up(uri, times):
    """Increment a shared counter ``times`` times; return how many swaps were lost on the way."""
    store = open_store(uri)
    lost = 0
    _barrier.wait(60)
    for _ in range(times):
        while True:
            data, etag = store.get_with_etag("counter")
            if store.put_if_match("counter", b"%d" % (int(data) + 1), etag):
                break
            lost += 1
    return lost


def overwrite(uri, worker, times, size_bytes):
    """Put whole objects of one repeated byte under one key, over and over."""
    store = open_store(uri)
    _barrier.wait(60)
    for _ in range(times):
        store.put("shared", bytes([worker]) * size_bytes)


def read_shared(uri, times):
    """Return every mixture of writers that was seen in one read."""
    store = open_store(uri)
    _barrier.wait(60)
    return [seen for _ in range(times) if len(seen := set(store.get("shared"))) != 1]
