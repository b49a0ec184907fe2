"""Content digests on stores that list etags and on stores that do not."""

from loraseg.batch.core.content_digest import content_digest
from loraseg.storage import open_store


def test_every_change_of_a_selected_object_changes_the_digest(store_uri):
    store = open_store(store_uri).with_prefix("photos")
    for key in ("a.png", "b/c.png", "z.png"):
        store.put(key, key.encode())
    keys = ["a.png", "b/c.png"]
    digests = [content_digest(store, keys)]
    store.put("z.png", b"not selected")
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
