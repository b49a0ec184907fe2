from dataclasses import replace

import numpy as np
import pytest

from loraseg.errors import StageError
from loraseg.inference.snapshot import AdapterFilter, build_snapshot
from loraseg.library import BaseModelInfo, Library
from loraseg.library.retrieve import AdapterRetriever
from loraseg.storage import open_store
from tests.unit.library.sample_adapters import BASE, make_card, make_centroid, make_files

ADAPTER_FILTER = AdapterFilter(base_digest=BASE.digest, encoder_id="clip")


@pytest.fixture
def library(tmp_path):
    return Library(open_store(str(tmp_path)))


def make_snapshot(library, adapter_filter=ADAPTER_FILTER):
    return build_snapshot("main", library.generation(), library.entries(), adapter_filter)


def add(library, name, **fields):
    card = make_card(name)
    return library.publish(name, make_files(name), replace(card, **fields))


def test_references_have_the_fields_of_the_catalog_entry(library):
    entry = add(library, "rain")
    [ref] = make_snapshot(library).pool.entries
    assert (ref.library, ref.name, ref.version) == ("main", "rain", 1)
    assert (ref.digest, ref.record_digest) == (entry.digest, entry.record_digest)
    assert (ref.base_digest, ref.size_bytes) == (BASE.digest, entry.size_bytes)


def test_distances_and_weights_are_those_of_the_library(library):
    for index in range(5):
        add(library, f"domain{index}", centroids=(make_centroid((float(index), 1.0)),))
    embeddings = np.array([[1.2, 0.5], [3.9, 1.0]])
    snapshot = make_snapshot(library).pool.retriever.retrieve_batch(embeddings, 3, 0.4, {"domain2"})
    known = AdapterRetriever(library.entries()).retrieve_batch(embeddings, 3, 0.4, {"domain2"})
    for mine, theirs in zip(snapshot, known, strict=True):
        assert [(n.entry.name, n.distance, n.weight) for n in mine] == [
            (n.entry.name, n.distance, n.weight) for n in theirs
        ]


@pytest.mark.parametrize(
    "odd",
    [
        {"role": "generator"},
        {"base": BaseModelInfo("other", "c" * 64)},
        {"centroids": ()},
        {"centroids": (make_centroid(encoder_id="another"),)},
        {"centroids": (make_centroid((1.0, 2.0, 3.0)),)},
        {"centroids": (make_centroid(), make_centroid(normalised=True))},
        {"recipe": {"clip_attention_lora": "inert"}},
    ],
)
def test_an_adapter_that_does_not_fit_does_not_hide_the_others(library, odd):
    for name in ("fog", "night"):
        add(library, name)
    add(library, "odd", **odd)
    snapshot = make_snapshot(library)
    assert [entry.name for entry in snapshot.pool.entries] == ["fog", "night"]
    assert list(snapshot.entries) == ["fog", "night"]
    assert (list(snapshot.incompatible), snapshot.generation) == (["odd"], 3)


@pytest.mark.parametrize(
    ("asked", "inert", "attention", "names"),
    [
        ("as_trained", 0, "active", 3),
        ("as_trained", 1, "active", 2),
        ("as_trained", 2, "inert", 2),
        ("as_trained", 3, "inert", 3),
        ("active", 2, "active", 3),
        ("inert", 0, "inert", 3),
    ],
)
def test_attention_follows_the_majority_unless_it_is_forced(
    library, asked, inert, attention, names
):
    for index in range(3):
        kind = "inert" if index < inert else "active"
        add(library, f"domain{index}", recipe={"clip_attention_lora": kind})
    snapshot = make_snapshot(library, replace(ADAPTER_FILTER, attention=asked))
    assert (snapshot.attention, len(snapshot.entries)) == (attention, names)


def test_a_tie_of_attention_states_gives_active(library):
    add(library, "fog", recipe={"clip_attention_lora": "inert"})
    add(library, "night")
    assert list(make_snapshot(library).entries) == ["night"]


def test_patterns_hide_names(library):
    for name in ("rain-heavy", "rain-light", "fog"):
        add(library, name)
    snapshot = make_snapshot(library)
    assert snapshot.invisible(None) == frozenset()
    assert snapshot.invisible(("rain-*",)) == {"fog"}
    assert snapshot.invisible(("RAIN-*", "f?g")) == {"rain-heavy", "rain-light"}
    assert snapshot.invisible(()) == {"rain-heavy", "rain-light", "fog"}
    assert snapshot.invisible(("rain-*",)) is snapshot.invisible(("rain-*",))


def test_the_cache_of_patterns_is_bounded(library):
    add(library, "fog")
    snapshot = make_snapshot(library)
    for index in range(1000):
        assert snapshot.invisible((f"pattern{index}",)) == {"fog"}
    assert len(snapshot._invisible_cache) <= 256


def test_the_reason_of_an_empty_pool_contains_no_location(library, tmp_path):
    empty = make_snapshot(library)
    assert (empty.generation, empty.pool.retriever, empty.entries) == (0, None, {})
    assert empty.pool.empty_reason == "library 'main' is empty"
    add(library, "fog", base=BaseModelInfo("other", "c" * 64))
    assert make_snapshot(library).pool.empty_reason == "no adapter of library 'main' fits"
    assert str(tmp_path) not in empty.pool.empty_reason


def test_weights_are_not_loaded_here(library):
    add(library, "fog")
    pool = make_snapshot(library).pool
    with pytest.raises(StageError, match="'fog': weights are loaded by the segmenter"):
        pool.load(pool.entries[0])
