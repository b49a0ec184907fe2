"""The engine in one process, on real libraries in folders."""

import asyncio
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from loraseg.adapters.peft_io import to_peft_files
from loraseg.backbones.clip import load_clip
from loraseg.errors import ServiceError
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.inference.selection import AdaptiveSettings
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library import Library
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from loraseg.serving.config import Limits
from loraseg.storage import open_store
from tests.unit.inference.tiny_service import SETTINGS, blob_paths, segment_request, service_config
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, publish, random_pairs, write_models

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path, models, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    publish(tmp_path / "library", load_base(models[0]), load_clip(models[1]))
    return tmp_path / "library"


@pytest.fixture
def library(folder):
    return Library(open_store(str(folder)))


@pytest.fixture
def engine(folder, models):
    with build_local_engine(service_config(models, {"main": folder})) as engine:
        assert engine.wait_until_ready(60.0)
        yield engine


def segment(engine, *orders):
    async def together():
        return await asyncio.gather(*map(engine.segment, orders), return_exceptions=True)

    return asyncio.run(together())


def image_of(domain):
    return domain_images(domain, 1)[0]


def used(outcome):
    return {part.name: part.digest for part in outcome.result.explanation.adapters}


def raised(engine, one):
    [error] = segment(engine, one)
    assert isinstance(error, ServiceError), error
    return error


def test_gives_what_the_command_line_gives_alone_and_in_company(engine, folder, models):
    loaded = load_models(SegmenterConfig(base=models[0], encoder=models[1]), str(folder))
    cases = [
        (domain, settings)
        for domain in DOMAINS
        for settings in (SETTINGS, AdaptiveSettings(mode="uniform"), AdaptiveSettings(mode="base"))
    ]
    orders = [
        segment_request(image_of(domain), settings=settings, maps=frozenset(["confidence"]))
        for domain, settings in cases
    ]
    together = segment(engine, *orders)
    assert max(outcome.batch for outcome in together) > 1
    for one, (domain, settings), company in zip(orders, cases, together, strict=True):
        offline = loaded.segmenter(settings)
        [known] = offline.segment([image_of(domain)], CLASSES, maps={"confidence"})
        [alone] = segment(engine, one)
        assert alone.result.explanation == company.result.explanation == known.explanation
        # This model's odd widths do not fill cache lines: sums round by where a row lies, so that a
        # pixel where two classes tie may go to either. Its confidence is the same.
        for result in (alone.result, company.result):
            assert np.abs(result.confidence - known.confidence).max() <= 1e-5
            assert (result.label_map == known.label_map).mean() >= 0.99
        if settings.mode == "base":  # no adapter's rows take part
            assert np.array_equal(alone.result.label_map, known.label_map)
            assert np.array_equal(alone.result.confidence, known.confidence)
        assert alone.generation == (None if settings.mode == "base" else 4)
        assert set(alone.timing_ms) == {"embed", "retrieve", "load", "segment", "queue"}


def test_a_damaged_adapter_takes_only_itself_out_of_service(engine, folder, library):
    [before] = segment(engine, segment_request(image_of("fog"), exclude={"day"}))
    nearest = next(iter(used(before)))
    # Still in memory and on this machine's disk: what is stored does not matter.
    blob_paths(folder, library, nearest)[WEIGHTS].unlink()
    [same] = segment(engine, segment_request(image_of("fog"), exclude={"day"}))
    assert (used(same), same.skipped) == (used(before), ())
    blob_paths(folder, library, "day")[WEIGHTS].write_bytes(b"nonsense")
    [after] = segment(engine, segment_request(image_of("day"), settings=AdaptiveSettings(k=4)))
    assert set(used(after)) == set(DOMAINS) - {"day"}
    [skipped] = after.skipped
    assert (skipped.name, skipped.reason) == ("day", "stored bytes differ from their digest")
    view = asyncio.run(engine.catalog("main"))
    assert {a.name: a.unavailable for a in view.adapters if a.unavailable} == {
        "day": "stored bytes differ from their digest"
    }
    files, card = library.load("night")
    error = raised(engine, segment_request(image_of("day"), only={"day"}))
    assert (error.code, error.retry_after_s) == (
        "adapters_unavailable",
        LibraryWatcher.BROKEN_QUARANTINE_S,
    )
    assert str(folder) not in str(error)
    library.publish("day", files, replace(card, name="day"))
    view = asyncio.run(engine.refresh("main"))
    assert not any(adapter.unavailable for adapter in view.adapters)
    [whole] = segment(engine, segment_request(image_of("day"), only={"day"}))
    assert used(whole) == {"day": library.entry("day").digest}


def test_when_every_choice_fails_it_is_told_after_three_rounds(engine, folder, library):
    for name in DOMAINS:
        blob_paths(folder, library, name)[WEIGHTS].unlink()
    one = AdaptiveSettings(k=1)
    error = raised(engine, segment_request(image_of("fog"), settings=one))
    assert (error.code, error.retry_after_s) == ("adapters_unavailable", 5.0)
    [bare] = segment(engine, segment_request(image_of("fog"), settings=one))
    assert bare.result.explanation.fallback == "every adapter is excluded or out of service"
    assert {skipped.reason for skipped in bare.skipped} == {"a stored file is missing"}
    [asked] = segment(
        engine, segment_request(image_of("fog"), settings=AdaptiveSettings(mode="base"))
    )
    assert np.array_equal(asked.result.label_map, bare.result.label_map)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"library": "other"}, "no_such_library"),
        ({"library": "other", "settings": AdaptiveSettings(mode="base")}, "no_such_library"),
        ({"only": {"fogg"}}, "no_such_adapter"),
        ({"only": {"fog"}, "visible": ("d*",)}, "no_such_adapter"),
        ({"timeout_s": -1.0}, "deadline"),
        ({"timeout_s": 0.0001}, "deadline"),
    ],
)
def test_refusals_have_their_codes(engine, options, code):
    assert raised(engine, segment_request(image_of("fog"), **options)).code == code


def test_too_many_at_once_are_refused(folder, models):
    config = service_config(models, {"main": folder}, batch=1, limits=Limits(queued=3))
    with build_local_engine(config) as engine:
        assert engine.wait_until_ready(60.0)
        outcomes = segment(engine, *[segment_request(image_of("fog")) for _ in range(12)])
    codes = [outcome.code for outcome in outcomes if isinstance(outcome, ServiceError)]
    assert codes == ["overloaded"] * 8
    assert sum(not isinstance(outcome, ServiceError) for outcome in outcomes) == 4


def test_cancelling_gives_up_the_work_and_lets_go_of_the_adapters(engine):
    async def cancelled():
        tasks = [
            asyncio.ensure_future(engine.segment(segment_request(image_of("fog"))))
            for _ in range(20)
        ]
        await asyncio.sleep(0.02)
        for task in tasks[1:]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *rest = asyncio.run(cancelled())
    assert first.batch >= 1
    assert all(isinstance(one, asyncio.CancelledError) or one.batch for one in rest)
    [again] = segment(engine, segment_request(image_of("fog")))
    assert np.array_equal(again.result.label_map, first.result.label_map)
    assert not any(slot.pins for slot in engine.stage.cache._slots.values())


def test_is_not_ready_without_its_libraries_and_says_which(models, folder, tmp_path):
    damaged = tmp_path / "damaged"
    (damaged / "catalog").mkdir(parents=True)
    (damaged / "catalog" / "HEAD").write_bytes(b"nonsense")
    libraries = {"main": folder, "other": damaged}
    with build_local_engine(service_config(models, libraries)) as engine:
        assert not engine.wait_until_ready(2.0)
        readiness = asyncio.run(engine.readiness())
        assert not readiness.ready
        assert "library 'other': the newest catalog is missing or damaged" in readiness.waiting_for
        assert raised(engine, segment_request(image_of("fog"), library="other")).code == "not_ready"
        # The base needs no library.
        bare = segment_request(
            image_of("fog"), library="other", settings=AdaptiveSettings(mode="base")
        )
        assert segment(engine, bare)[0].generation is None


def test_tells_what_is_frozen_and_what_is_published_but_not_where(engine, folder, models):
    base = asyncio.run(engine.base())
    known = load_base(models[0])
    assert (base["name"], base["digest"]) == ("base.safetensors", known.digest)
    assert base["encoder"]["id"] == load_clip(models[1]).encoder_id
    assert base["settings"] == {"top_k": 5, "temperature": 0.05}
    view = asyncio.run(engine.catalog("main"))
    assert [adapter.name for adapter in view.adapters] == sorted(DOMAINS)
    assert (view.generation, view.misfits, view.problem) == (4, 0, None)
    card = asyncio.run(engine.card("main", "fog"))
    assert (card["version"], card["label_space"]) == (1, list(CLASSES))
    assert "centroids" not in card
    text = json.dumps([base, card, repr(view)])
    assert str(folder.parent) not in text
    with pytest.raises(ServiceError, match="no adapter 'fogg'"):
        asyncio.run(engine.card("main", "fogg"))
    with pytest.raises(ServiceError, match="no library 'x'"):
        asyncio.run(engine.catalog("x"))


def test_no_answer_is_ever_of_two_generations(engine, library, models):
    """Publish and roll back while images are segmented; check all digests against the catalog."""
    base = load_base(models[0])
    files = [
        to_peft_files(random_pairs(base.model, 90 + n), base_digest=base.digest) for n in (0, 1)
    ]
    card = library.load("fog")[1]
    stop = threading.Event()

    def publish_and_roll_back():
        for turn in range(6):
            for name in ("fog", "day"):
                library.publish(name, files[turn % 2], replace(card, name=name))
            library.rollback("fog", 1)
        stop.set()

    publisher = threading.Thread(target=publish_and_roll_back)
    publisher.start()
    outcomes = []
    while not stop.is_set() or len(outcomes) < 16:
        domains = list(DOMAINS)
        settings = AdaptiveSettings(k=4, temperature=3.0)
        outcomes += segment(
            engine, *[segment_request(image_of(d), settings=settings) for d in domains]
        )
    publisher.join()
    deadline = time.monotonic() + 60
    while asyncio.run(engine.catalog("main")).generation != library.generation():
        assert time.monotonic() < deadline
    for outcome in outcomes:
        known = {entry.name: entry.digest for entry in library.entries(outcome.generation)}
        assert used(outcome) == known
        assert outcome.skipped == ()
