"""Digests of what a store holds, on stores that list etags and on those that do not."""

from loraseg.batch.core.content_digest import content_digest
from loraseg.storage import open_store


def test_every_change_is_seen(store_uri):
    store = open_store(store_uri).with_prefix("photos")
    for key in ("a.png", "b/c.png", "z.png"):
        store.put(key, key.encode())
    keys = ["a.png", "b/c.png"]
    digests = [content_digest(store, keys)]
    store.put("z.png", b"another one, that nobody asked for")
    assert content_digest(store, keys) == digests[0]
    assert content_digest(store.with_prefix("b"), ["c.png"]) != digests[0]
    digests.append(content_digest(store, ["a.png"]))
    store.put("b/c.png", b"B/C.PNG")
    digests.append(content_digest(store, keys))
    store.delete("b/c.png")
    digests.append(content_digest(store, keys))
    assert len(set(digests)) == 4
    store.put("b/c.png", b"b/c.png")
    assert content_digest(store, keys) == digests[0]
