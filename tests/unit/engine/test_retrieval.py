import numpy as np
import pytest

from loraseg.engine.adapter_ref import AdapterRef, Failure
from loraseg.engine.live import LiveLibrary
from loraseg.engine.retrieval import Ask, RetrievalStage
from loraseg.engine.shelf import Taste
from loraseg.errors import AdapterNotFoundError, DatasetError, ServiceError
from loraseg.library import Library
from loraseg.library.retrieve import Retriever
from loraseg.segment.choice import AdaptiveSettings
from loraseg.storage import open_store
from tests.unit.engine.world import SETTINGS, wish
from tests.unit.tiny import DOMAINS, domain_images, publish


@pytest.fixture
def library(folder):
    return Library(open_store(str(folder)))


@pytest.fixture
def taste(base, encoder):
    return Taste(base_digest=base.digest, encoder_id=encoder.encoder_id)


@pytest.fixture
def live(library, taste):
    live = LiveLibrary(library, name="main", taste=taste, poll_s=60.0)
    live.refresh()
    return live


@pytest.fixture
def stage(encoder, live):
    return RetrievalStage(encoder, {"main": live})


def ask(domain="fog", *, library="main", image=None, visible=None, failed=(), **wanted):
    picture = domain_images(domain, 1)[0] if image is None else image
    return Ask(
        image=picture, library=library, wish=wish(**wanted), visible=visible, failed=tuple(failed)
    )


def failure_of(live, name, kind="damaged"):
    entry = live.shelf().entries[name]
    return Failure(name, entry.version, entry.digest, "words", kind)


def names(picked):
    return [part.entry.name for part in picked.choice.parts]


def error_of(stage, one):
    [error] = stage.choose([one])
    assert isinstance(error, Exception), error
    return error


def test_picks_what_the_library_retrieves(stage, library, encoder):
    retriever = Retriever(library.entries(), encoder_id=encoder.encoder_id)
    for domain in DOMAINS:
        [picked] = stage.choose([ask(domain)])
        [embedding] = encoder.encode_images([domain_images(domain, 1)[0]])
        known = retriever.retrieve(embedding, SETTINGS.k, SETTINGS.temperature)
        assert [(p.entry.name, p.weight, p.distance) for p in picked.choice.parts] == [
            (near.entry.name, near.weight, near.distance) for near in known
        ]
        assert {type(part.entry) for part in picked.choice.parts} == {AdapterRef}
        assert (picked.generation, picked.attention, picked.skipped) == (4, "active", ())
        assert set(picked.timing_ms) == {"embed", "retrieve"}


def test_an_image_gets_the_same_numbers_in_any_company(stage):
    asks = [
        ask("fog"),
        ask("day", settings=AdaptiveSettings(k=3, temperature=1.0)),
        ask("night", settings=AdaptiveSettings(mode="uniform")),
        ask("dusk", only={"day", "fog"}),
        ask("dusk", settings=AdaptiveSettings(mode="base")),
        ask("fog", exclude={"fog"}),
        ask("fog", visible=("d*",)),
    ]
    together = stage.choose(asks)
    alone = [stage.choose([one])[0] for one in asks]
    assert [picked.choice for picked in together] == [picked.choice for picked in alone]
    assert names(together[3]) == ["day", "fog"] or names(together[3]) == ["fog", "day"]
    assert sorted(names(together[2])) == sorted(DOMAINS)
    assert names(together[4]) == []
    assert "fog" not in names(together[5])
    assert set(names(together[6])) == {"day", "dusk"}


def test_embedding_together_changes_no_more_than_the_last_bits(encoder, live):
    asks = [ask(domain) for domain in DOMAINS]
    apart = RetrievalStage(encoder, {"main": live}).choose(asks)
    together = RetrievalStage(encoder, {"main": live}, embed_together=True).choose(asks)
    for one, other in zip(apart, together, strict=True):
        assert names(one) == names(other)
        for mine, theirs in zip(one.choice.parts, other.choice.parts, strict=True):
            assert mine.distance == pytest.approx(theirs.distance, abs=1e-4)


@pytest.mark.parametrize("together", [False, True])
def test_one_bad_ask_never_hurts_the_others(encoder, live, together):
    stage = RetrievalStage(encoder, {"main": live}, embed_together=together)
    bad = {
        1: (ask(image=np.zeros((4, 4), np.uint8)), DatasetError),
        2: (ask(library="other"), ServiceError),
        4: (ask(only={"fogg"}), AdapterNotFoundError),
    }
    asks = [bad[i][0] if i in bad else ask("night") for i in range(6)]
    [good] = stage.choose([ask("night")])
    for index, answer in enumerate(stage.choose(asks)):
        if index in bad:
            assert isinstance(answer, bad[index][1])
        else:
            assert names(answer) == names(good)


def test_an_unknown_library_is_said_with_those_there_are(stage):
    error = error_of(stage, ask(library="mian"))
    assert (error.code, str(error)) == ("no_such_library", "no library 'mian'; there are 'main'")


def test_a_library_that_is_not_loaded_yet_is_not_ready(encoder, library, taste):
    live = LiveLibrary(library, name="main", taste=taste, poll_s=60.0)
    assert error_of(RetrievalStage(encoder, {"main": live}), ask()).code == "not_ready"


def test_a_name_that_is_not_visible_is_like_one_that_is_not_there(stage):
    hidden = error_of(stage, ask(only={"fog"}, visible=("d*",)))
    absent = error_of(stage, ask(only={"fag"}, visible=("d*",)))
    assert isinstance(hidden, AdapterNotFoundError)
    assert type(absent) is type(hidden)
    assert str(hidden).replace("fog", "fag") == str(absent)
    assert "'fog'" in str(error_of(stage, ask(only={"fag"})))


def test_what_failed_is_left_out_and_reported_to_all_who_may_see_it(stage, live):
    [before] = stage.choose([ask("fog")])
    failure = failure_of(live, names(before)[0])
    [again] = stage.choose([ask("fog", failed=[failure])])
    assert failure.name not in names(again)
    assert len(names(again)) == SETTINGS.k
    assert again.skipped == (failure,)
    [other, blind, bare] = stage.choose(
        [ask("day"), ask("day", visible=("x*",)), ask(settings=AdaptiveSettings(mode="base"))]
    )
    assert other.skipped == (failure,)
    assert blind.skipped == ()
    assert bare.choice.fallback is None


def test_a_forced_adapter_that_is_out_of_service_is_not_replaced(stage, live):
    live.set_aside(failure_of(live, "fog"))
    error = error_of(stage, ask(only={"fog", "day"}))
    assert (error.code, error.retry_after_s) == ("adapters_unavailable", LiveLibrary.BROKEN_S)
    assert str(error) == "adapter 'fog' is out of service: words"
    [picked] = stage.choose([ask(only={"fog", "day"}, exclude={"fog"})])
    assert names(picked) == ["day"]


def test_the_base_takes_over_when_all_are_broken_but_not_when_the_store_is_away(stage, live):
    for name in DOMAINS:
        live.set_aside(failure_of(live, name))
    [picked] = stage.choose([ask()])
    assert picked.choice.fallback == "every adapter is excluded or out of service"
    assert (len(picked.skipped), picked.attention) == (4, None)
    live.set_aside(failure_of(live, "fog", "unreachable"))
    error = error_of(stage, ask())
    assert (error.code, error.retry_after_s) == (
        "adapters_unavailable",
        LiveLibrary.UNREACHABLE_S,
    )


def test_excluding_all_falls_back_with_a_reason(stage):
    [picked] = stage.choose([ask(exclude=set(DOMAINS))])
    assert picked.choice.fallback == "every adapter was excluded"
    [picked] = stage.choose([ask(visible=())])
    assert picked.choice.fallback == "every adapter was excluded"


def test_an_empty_library_falls_back_without_embedding(tmp_path, taste):
    class NoEncoder:
        def encode_images(self, images):
            raise AssertionError

    live = LiveLibrary(
        Library(open_store(str(tmp_path / "none"))), name="main", taste=taste, poll_s=60.0
    )
    live.refresh()
    [picked] = RetrievalStage(NoEncoder(), {"main": live}).choose([ask()])
    assert (picked.generation, picked.choice.fallback) == (0, "library 'main' is empty")


def test_a_mix_of_too_many_adapters_is_refused(stage, monkeypatch):
    monkeypatch.setattr("loraseg.engine.retrieval._MOST_PARTS", 3)
    uniform = AdaptiveSettings(mode="uniform")
    for wanted in ({"settings": uniform}, {"settings": AdaptiveSettings(k=4)}, {"only": DOMAINS}):
        error = error_of(stage, ask(**wanted))
        assert error.code == "invalid"
        assert "4 adapters" in str(error)
    for wanted in ({"exclude": {"fog"}, "settings": uniform}, {"settings": AdaptiveSettings(k=3)}):
        assert len(names(stage.choose([ask(**wanted)])[0])) == 3


def test_libraries_are_kept_apart(encoder, live, taste, tmp_path, base):
    publish(tmp_path / "second", base, encoder, names=("dusk",))
    second = LiveLibrary(
        Library(open_store(str(tmp_path / "second"))), name="second", taste=taste, poll_s=60.0
    )
    second.refresh()
    stage = RetrievalStage(encoder, {"main": live, "second": second})
    one, other = stage.choose([ask("fog"), ask("fog", library="second")])
    assert (names(other), other.generation) == (["dusk"], 1)
    assert {part.entry.library for part in other.choice.parts} == {"second"}
    assert {part.entry.library for part in one.choice.parts} == {"main"}
    stage.choose([ask("fog", failed=[failure_of(live, "fog")])])
    assert second.status().out_of_service == ()
