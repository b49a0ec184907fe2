import numpy as np
import pytest

from loraseg.errors import AdapterNotFoundError, DatasetError, ServiceError
from loraseg.inference.adapter_ref import AdapterFailure, AdapterRef
from loraseg.inference.request import SegmentRequest
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.selection import AdaptiveSettings
from loraseg.inference.snapshot import AdapterFilter
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library import Library
from loraseg.library.retrieve import AdapterRetriever
from loraseg.storage import open_store
from tests.unit.inference.tiny_service import SETTINGS, adapter_query
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, publish


@pytest.fixture
def library(folder):
    return Library(open_store(str(folder)))


@pytest.fixture
def adapter_filter(base, encoder):
    return AdapterFilter(base_digest=base.digest, encoder_id=encoder.encoder_id)


@pytest.fixture
def watcher(library, adapter_filter):
    watcher = LibraryWatcher(library, name="main", adapter_filter=adapter_filter, poll_s=60.0)
    watcher.refresh()
    return watcher


@pytest.fixture
def stage(encoder, watcher):
    return RetrievalStage(encoder, {"main": watcher})


def make_request(domain="fog", *, library="main", image=None, visible=None, failed=(), **wanted):
    picture = domain_images(domain, 1)[0] if image is None else image
    return SegmentRequest(
        image=picture,
        classes=CLASSES,
        library=library,
        query=adapter_query(**wanted),
        visible=visible,
        failed=tuple(failed),
    )


def make_failure(watcher, name, kind="damaged"):
    entry = watcher.snapshot().entries[name]
    return AdapterFailure(name, entry.version, entry.digest, "words", kind)


def adapter_names(selection):
    return [part.entry.name for part in selection.adapters]


def retrieve_error(stage, one):
    [error] = stage.retrieve([one])
    assert isinstance(error, Exception), error
    return error


def test_selects_what_the_library_retrieves(stage, library, encoder):
    retriever = AdapterRetriever(library.entries(), encoder_id=encoder.encoder_id)
    for domain in DOMAINS:
        [selection] = stage.retrieve([make_request(domain)])
        [embedding] = encoder.encode_images([domain_images(domain, 1)[0]])
        known = retriever.retrieve(embedding, SETTINGS.k, SETTINGS.temperature)
        assert [(p.entry.name, p.weight, p.distance) for p in selection.adapters] == [
            (near.entry.name, near.weight, near.distance) for near in known
        ]
        assert {type(part.entry) for part in selection.adapters} == {AdapterRef}
        assert (selection.generation, selection.attention, selection.skipped) == (4, "active", ())
        assert set(selection.timing_ms) == {"embed", "retrieve"}


def test_a_selection_does_not_depend_on_the_batch(stage):
    requests = [
        make_request("fog"),
        make_request("day", settings=AdaptiveSettings(k=3, temperature=1.0)),
        make_request("night", settings=AdaptiveSettings(mode="uniform")),
        make_request("dusk", only={"day", "fog"}),
        make_request("dusk", settings=AdaptiveSettings(mode="base")),
        make_request("fog", exclude={"fog"}),
        make_request("fog", visible=("d*",)),
    ]
    together = stage.retrieve(requests)
    alone = [stage.retrieve([one])[0] for one in requests]
    assert [selection for selection in together] == [selection for selection in alone]
    assert adapter_names(together[3]) == ["day", "fog"] or adapter_names(together[3]) == [
        "fog",
        "day",
    ]
    assert sorted(adapter_names(together[2])) == sorted(DOMAINS)
    assert adapter_names(together[4]) == []
    assert "fog" not in adapter_names(together[5])
    assert set(adapter_names(together[6])) == {"day", "dusk"}


def test_embedding_together_changes_only_the_last_bits(encoder, watcher):
    requests = [make_request(domain) for domain in DOMAINS]
    apart = RetrievalStage(encoder, {"main": watcher}).retrieve(requests)
    together = RetrievalStage(encoder, {"main": watcher}, embed_together=True).retrieve(requests)
    for one, other in zip(apart, together, strict=True):
        assert adapter_names(one) == adapter_names(other)
        for mine, theirs in zip(one.adapters, other.adapters, strict=True):
            assert mine.distance == pytest.approx(theirs.distance, abs=1e-4)


@pytest.mark.parametrize("together", [False, True])
def test_an_invalid_request_does_not_affect_the_others(encoder, watcher, together):
    stage = RetrievalStage(encoder, {"main": watcher}, embed_together=together)
    bad = {
        1: (make_request(image=np.zeros((4, 4), np.uint8)), DatasetError),
        2: (make_request(library="other"), ServiceError),
        4: (make_request(only={"fogg"}), AdapterNotFoundError),
    }
    requests = [bad[i][0] if i in bad else make_request("night") for i in range(6)]
    [good] = stage.retrieve([make_request("night")])
    for index, result in enumerate(stage.retrieve(requests)):
        if index in bad:
            assert isinstance(result, bad[index][1])
        else:
            assert adapter_names(result) == adapter_names(good)


def test_the_error_for_an_unknown_library_lists_the_known_ones(stage):
    error = retrieve_error(stage, make_request(library="mian"))
    assert (error.code, str(error)) == ("no_such_library", "no library 'mian'; there are 'main'")


def test_a_library_that_is_not_loaded_yet_is_not_ready(encoder, library, adapter_filter):
    watcher = LibraryWatcher(library, name="main", adapter_filter=adapter_filter, poll_s=60.0)
    assert (
        retrieve_error(RetrievalStage(encoder, {"main": watcher}), make_request()).code
        == "not_ready"
    )


def test_an_invisible_name_gives_the_same_error_as_a_missing_one(stage):
    hidden = retrieve_error(stage, make_request(only={"fog"}, visible=("d*",)))
    absent = retrieve_error(stage, make_request(only={"fag"}, visible=("d*",)))
    assert isinstance(hidden, AdapterNotFoundError)
    assert type(absent) is type(hidden)
    assert str(hidden).replace("fog", "fag") == str(absent)
    assert "'fog'" in str(retrieve_error(stage, make_request(only={"fag"})))


def test_failed_adapters_are_left_out_and_reported_to_clients_that_may_see_them(stage, watcher):
    [before] = stage.retrieve([make_request("fog")])
    failure = make_failure(watcher, adapter_names(before)[0])
    [again] = stage.retrieve([make_request("fog", failed=[failure])])
    assert failure.name not in adapter_names(again)
    assert len(adapter_names(again)) == SETTINGS.k
    assert again.skipped == (failure,)
    [other, blind, bare] = stage.retrieve(
        [
            make_request("day"),
            make_request("day", visible=("x*",)),
            make_request(settings=AdaptiveSettings(mode="base")),
        ]
    )
    assert other.skipped == (failure,)
    assert blind.skipped == ()
    assert bare.fallback is None


def test_a_requested_adapter_that_is_out_of_service_is_not_replaced(stage, watcher):
    watcher.quarantine(make_failure(watcher, "fog"))
    error = retrieve_error(stage, make_request(only={"fog", "day"}))
    assert (error.code, error.retry_after_s) == (
        "adapters_unavailable",
        LibraryWatcher.BROKEN_QUARANTINE_S,
    )
    assert str(error) == "adapter 'fog' is out of service: words"
    [selection] = stage.retrieve([make_request(only={"fog", "day"}, exclude={"fog"})])
    assert adapter_names(selection) == ["day"]


def test_the_base_is_used_if_all_adapters_are_damaged_but_not_if_the_store_is_unreachable(
    stage, watcher
):
    for name in DOMAINS:
        watcher.quarantine(make_failure(watcher, name))
    [selection] = stage.retrieve([make_request()])
    assert selection.fallback == "every adapter is excluded or out of service"
    assert (len(selection.skipped), selection.attention) == (4, None)
    watcher.quarantine(make_failure(watcher, "fog", "unreachable"))
    error = retrieve_error(stage, make_request())
    assert (error.code, error.retry_after_s) == (
        "adapters_unavailable",
        LibraryWatcher.UNREACHABLE_QUARANTINE_S,
    )


def test_excluding_all_adapters_falls_back_with_a_reason(stage):
    [selection] = stage.retrieve([make_request(exclude=set(DOMAINS))])
    assert selection.fallback == "every adapter was excluded"
    [selection] = stage.retrieve([make_request(visible=())])
    assert selection.fallback == "every adapter was excluded"


def test_an_empty_library_falls_back_without_embedding(tmp_path, adapter_filter):
    class NoEncoder:
        def encode_images(self, images):
            raise AssertionError

    watcher = LibraryWatcher(
        Library(open_store(str(tmp_path / "none"))),
        name="main",
        adapter_filter=adapter_filter,
        poll_s=60.0,
    )
    watcher.refresh()
    [selection] = RetrievalStage(NoEncoder(), {"main": watcher}).retrieve([make_request()])
    assert (selection.generation, selection.fallback) == (0, "library 'main' is empty")


def test_a_mix_of_too_many_adapters_is_refused(stage, monkeypatch):
    monkeypatch.setattr("loraseg.inference.retrieval._MAX_ADAPTERS_PER_IMAGE", 3)
    uniform = AdaptiveSettings(mode="uniform")
    for wanted in ({"settings": uniform}, {"settings": AdaptiveSettings(k=4)}, {"only": DOMAINS}):
        error = retrieve_error(stage, make_request(**wanted))
        assert error.code == "invalid"
        assert "4 adapters" in str(error)
    for wanted in ({"exclude": {"fog"}, "settings": uniform}, {"settings": AdaptiveSettings(k=3)}):
        assert len(adapter_names(stage.retrieve([make_request(**wanted)])[0])) == 3


def test_libraries_are_kept_apart(encoder, watcher, adapter_filter, tmp_path, base):
    publish(tmp_path / "second", base, encoder, names=("dusk",))
    second = LibraryWatcher(
        Library(open_store(str(tmp_path / "second"))),
        name="second",
        adapter_filter=adapter_filter,
        poll_s=60.0,
    )
    second.refresh()
    stage = RetrievalStage(encoder, {"main": watcher, "second": second})
    one, other = stage.retrieve([make_request("fog"), make_request("fog", library="second")])
    assert (adapter_names(other), other.generation) == (["dusk"], 1)
    assert {part.entry.library for part in other.adapters} == {"second"}
    assert {part.entry.library for part in one.adapters} == {"main"}
    stage.retrieve([make_request("fog", failed=[make_failure(watcher, "fog")])])
    assert second.status().quarantined == ()
