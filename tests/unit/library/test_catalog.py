import concurrent.futures
import dataclasses

import pytest

from loraseg.adapters import files_digest
from loraseg.errors import AdapterNotFoundError, IntegrityError, StoreError
from loraseg.library import Library
from loraseg.library.records import blob_key
from loraseg.storage import LocalStore
from tests.unit.library.sample_adapters import make_card, make_centroid, make_files


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


@pytest.fixture
def library(store):
    return Library(store)


def publish(library, name, content="weights"):
    return library.publish(name, make_files(content), make_card(name))


def name_version_pairs(entries):
    return [(entry.name, entry.version) for entry in entries]


def test_an_empty_library(library):
    assert library.generation() == 0
    assert library.entries() == ()
    assert library.versions("fog") == ()
    assert library.verify().ok
    with pytest.raises(AdapterNotFoundError, match="no adapter 'fog' among 0"):
        library.load("fog")


def test_published_files_are_loaded(library, store):
    entry = publish(library, "fog")
    assert (entry.name, entry.version, entry.current) == ("fog", 1, True)
    assert entry.digest == files_digest(make_files())
    assert entry.size_bytes == sum(map(len, make_files().values()))
    for reader in (library, Library(store)):
        assert reader.load("fog") == (make_files(), make_card("fog"))
        assert reader.entries() == (entry,)
        assert reader.generation() == 1


def test_the_layout(library, store):
    entry = publish(library, "fog")
    record = store.get("adapters/fog/1.json")
    blobs = [key for key in store.list() if key.startswith("blobs/sha256/")]
    assert list(store.list()) == [
        "adapters/fog/1.json",
        *blobs,
        "catalog/00000001.parquet",
        "catalog/HEAD",
    ]
    assert len(blobs) == 2
    assert all(key == blob_key(key[-64:]) for key in blobs)
    assert entry.digest.encode() in record
    assert b'"generation":1' in store.get("catalog/HEAD")


def test_names_point_to_the_newest_until_rolled_back(library):
    first = publish(library, "fog", "one")
    publish(library, "rain")
    second = publish(library, "fog", "two")
    assert name_version_pairs(library.entries()) == [("fog", 2), ("rain", 1)]
    assert name_version_pairs(library.versions("fog")) == [("fog", 1), ("fog", 2)]
    back = library.rollback("fog", 1)
    assert (back.version, back.digest, back.current) == (1, first.digest, True)
    assert name_version_pairs(library.entries()) == [("fog", 1), ("rain", 1)]
    assert library.load("fog")[0] == make_files("one")
    assert library.load("fog", 2)[0] == make_files("two")
    assert library.rollback("fog", 2).digest == second.digest


def test_a_retired_name_is_gone_until_it_is_brought_back(library, store):
    publish(library, "fog", "one")
    publish(library, "fog", "two")
    publish(library, "rain")
    library.retire("fog")
    assert name_version_pairs(Library(store).entries()) == [("rain", 1)]
    with pytest.raises(AdapterNotFoundError, match="'fog' is retired; it has versions 1, 2"):
        library.entry("fog")
    assert library.load("fog", 2)[0] == make_files("two")
    assert library.verify().ok
    assert not publish(library, "fog", "two").current, "a job that runs again changes nothing"
    generation = library.generation()
    library.retire("fog")
    assert library.generation() == generation, "it was retired already"
    assert library.rollback("fog", 1).current
    library.retire("fog")
    assert publish(library, "fog", "three").current
    with pytest.raises(AdapterNotFoundError, match="did you mean 'fog'"):
        library.retire("fgo")


def test_older_generations_stay_readable(library):
    publish(library, "fog", "one")
    publish(library, "fog", "two")
    library.rollback("fog", 1)
    assert [name_version_pairs(library.entries(g)) for g in range(4)] == [
        [],
        [("fog", 1)],
        [("fog", 2)],
        [("fog", 1)],
    ]
    for generation in (-1, 4):
        with pytest.raises(AdapterNotFoundError, match="the newest is 3"):
            library.entries(generation)


def test_publishing_the_same_again_changes_nothing(library, store):
    first = publish(library, "fog", "one")
    publish(library, "fog", "two")
    before = list(store.list())
    again = library.publish("fog", make_files("one"), make_card("fog", code_revision="newer"))
    assert (again.version, again.card) == (1, first.card)
    assert not again.current, "a job that runs again must not undo a rollback"
    assert list(store.list()) == before
    assert library.rollback("fog", 2).current
    assert list(store.list()) == before, "the pointer was there already"


def test_the_same_weights_indexed_by_another_encoder_are_news(library):
    files = make_files("one")
    library.publish("fog", files, make_card("fog"))
    other = make_card("fog", centroids=[make_centroid(encoder_id="other clip")])
    assert library.publish("fog", files, other).version == 2
    assert library.publish("fog", files, other).version == 2
    assert library.entry("fog").card.centroids[0].encoder_id == "other clip"


def test_the_same_weights_by_another_task_are_news(library):
    files = make_files("one")
    library.publish("fog", files, make_card("fog"))
    again = dataclasses.replace(make_card("fog"), recipe={"task_digest": "other"})
    assert library.publish("fog", files, again).version == 2
    assert library.publish("fog", files, again).version == 2


def test_several_adapters_are_one_generation(library):
    items = [(name, make_files(name), make_card(name)) for name in ("c", "a", "b")]
    assert [entry.name for entry in library.publish_all(items)] == ["c", "a", "b"]
    assert name_version_pairs(library.entries()) == [("a", 1), ("b", 1), ("c", 1)]
    assert library.generation() == 1
    with pytest.raises(IntegrityError, match="two adapters of one name"):
        library.publish_all([items[0], items[0]])
    assert library.publish_all([]) == ()
    assert library.generation() == 1


def test_other_versions_and_names_are_suggested(library):
    publish(library, "fog-light")
    with pytest.raises(AdapterNotFoundError, match="did you mean 'fog-light'"):
        library.load("fog-lite")
    with pytest.raises(AdapterNotFoundError, match="'fog-light' has no version 2; it has 1"):
        library.load("fog-light", 2)
    with pytest.raises(AdapterNotFoundError, match="no version 7"):
        library.rollback("fog-light", 7)


@pytest.mark.parametrize("name", ["../up", "A", "", "a/b", "x" * 129])
def test_hostile_names(library, store, name):
    with pytest.raises(IntegrityError, match="adapter name"):
        library.publish(name, make_files(), make_card("fog"))
    with pytest.raises(IntegrityError, match="adapter name"):
        library.load(name)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "adapter_config.json, adapter_model.safetensors missing"),
        ({"adapter_config.json": b""}, "adapter_model.safetensors missing"),
        ({**make_files(), "../up": b""}, r"file name '\.\./up' is not allowed"),
        ({**make_files(), ".hidden": b""}, "is not allowed"),
        ({**make_files(), "card.json": b""}, "pass the card as card"),
        ({**make_files(), **{f"f{i}": b"" for i in range(63)}}, "65 files, at most 64"),
    ],
)
def test_hostile_files(library, store, files, message):
    with pytest.raises(IntegrityError, match=message):
        library.publish("fog", files, make_card("fog"))
    assert list(store.list()) == []


def test_a_card_of_another_name(library):
    with pytest.raises(IntegrityError, match="cannot publish 'rain' with the card of 'fog'"):
        library.publish("rain", make_files(), make_card("fog"))


def test_other_files_travel_along(library):
    files = {**make_files(), "README.md": b"words"}
    entry = library.publish("fog", files, make_card("fog"))
    assert entry.digest == files_digest(make_files())
    assert library.load("fog")[0] == files


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("kind", ["blobs", "adapters"])
def test_damage_is_found_and_republishing_restores_blobs(library, store, kind, damage):
    publish(library, "fog")
    key = next(store.list(f"{kind}/"))
    data = store.get(key)
    if damage == "remove":
        store.delete(key)
    else:
        store.put(key, data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    word = "missing" if damage == "remove" else "damaged"
    with pytest.raises(IntegrityError, match=f"{key} is {word}"):
        library.load("fog")
    report = library.verify()
    assert not report.ok
    assert (report.missing if damage == "remove" else report.corrupt) == (key,)
    publish(library, "fog")
    assert library.verify().ok is (kind == "blobs")


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("catalog/HEAD", b""),
        ("catalog/HEAD", b"{}"),
        ("catalog/HEAD", b'{"generation":1,"sha256":"../../x"}'),
        ("catalog/HEAD", b'{"generation":true,"sha256":"%s"}' % (b"0" * 64)),
        ("catalog/HEAD", b" " * 5000),
        ("catalog/00000001.parquet", b"PAR1"),
    ],
)
def test_a_damaged_catalog_is_never_built_upon(library, store, key, data):
    publish(library, "fog")
    store.put(key, data)
    for operation in (lambda lib: lib.entries(), lambda lib: publish(lib, "rain")):
        with pytest.raises(IntegrityError, match="catalog/"):
            operation(Library(store))


def test_a_store_without_conditional_writes_is_refused(tmp_path):
    class Overwriting(LocalStore):
        def put_if_absent(self, key, data):
            self.put(key, data)
            return True

    with pytest.raises(StoreError, match="ignores If-None-Match"):
        publish(Library(Overwriting(tmp_path)), "fog")


def test_a_swap_that_landed_unnoticed_is_no_loss(tmp_path):
    """Its answer was lost, or another writer has moved HEAD for us."""

    class Forgetful(LocalStore):
        def put_if_absent(self, key, data):
            return super().put_if_absent(key, data) and key != "catalog/HEAD"

        def put_if_match(self, key, data, etag):
            return super().put_if_match(key, data, etag) and key != "catalog/HEAD"

    library = Library(Forgetful(tmp_path))
    for name in ("fog", "rain"):
        assert publish(library, name).version == 1
    assert Library(LocalStore(tmp_path)).generation() == 2
    assert {entry.name for entry in library.entries()} == {"fog", "rain"}
    assert library.verify().ok


def test_publishers_race_and_none_loses(store):
    shared = Library(store)

    def work(worker):
        library = shared if worker % 2 else Library(store)
        for number in range(5):
            publish(library, f"w{worker}-{number}")
            publish(library, "shared", f"{worker}-{number}")

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    library = Library(store)
    names = {f"w{worker}-{number}" for worker in range(6) for number in range(5)}
    assert {entry.name for entry in library.entries()} == {*names, "shared"}
    versions = library.versions("shared")
    assert [entry.version for entry in versions] == list(range(1, 31))
    assert sum(entry.current for entry in versions) == 1
    report = library.verify()
    assert report.ok
    assert report.garbage == ()
    assert library.generation() == 60
