import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraseg.lru_cache import LruCache


def naive_lru(keys, limit, size):
    """Replay accesses on a list, most recent last."""
    kept, created = [], []
    for key in keys:
        if key in kept:
            kept.remove(key)
        else:
            created.append(key)
        kept.append(key)
        while sum(map(size, kept)) > limit and len(kept) > 1:
            kept.pop(0)
    return kept, created


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [lambda value: 1, lambda value: value % 4 + 1])
def test_keeps_and_creates_what_a_naive_cache_does(seed, size):
    keys = random.Random(seed).choices(range(12), k=300)
    cache, created = LruCache(9, size), []
    for count, key in enumerate(keys, 1):
        assert cache.get_or_create(key, lambda key=key: created.append(key) or key) == key
        kept, expected = naive_lru(keys[:count], 9, size)
        assert [key for key in range(12) if key in cache] == sorted(kept)
        assert created == expected
        assert (len(cache), cache.size) == (len(kept), sum(map(size, kept)))


def test_the_newest_value_stays_even_beyond_the_limit():
    cache = LruCache(2, len)
    cache.get_or_create("a", lambda: "xx")
    cache.get_or_create("b", lambda: "yyyy")
    assert ("a" in cache, "b" in cache, cache.size) == (False, True, 4)


def test_an_error_while_creating_keeps_nothing():
    cache = LruCache(2)
    with pytest.raises(ValueError, match="a bug"):
        cache.get_or_create("a", lambda: int("a bug"))
    assert len(cache) == 0
    assert cache.get_or_create("a", lambda: 1) == 1


def test_threads_keep_the_size_within_the_limit():
    cache = LruCache(5)

    def access(seed):
        for key in random.Random(seed).choices(range(20), k=500):
            assert cache.get_or_create(key, lambda key=key: key) == key

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(access, range(4)))
    assert len(cache) == cache.size == 5
