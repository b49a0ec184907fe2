"""The local engine on libraries in folders."""

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


def segment(engine, *requests):
    async def run_all():
        return await asyncio.gather(*map(engine.segment, requests), return_exceptions=True)

    return asyncio.run(run_all())


def image_of(domain):
    return domain_images(domain, 1)[0]


def used(result):
    return {part.name: part.digest for part in result.explanation.adapters}


def raised(engine, request):
    [error] = segment(engine, request)
    assert isinstance(error, ServiceError), error
    return error


def test_results_equal_the_offline_segmenter_alone_and_in_a_batch(engine, folder, models):
    loaded = load_models(SegmenterConfig(base=models[0], encoder=models[1]), str(folder))
    cases = [
        (domain, settings)
        for domain in DOMAINS
        for settings in (SETTINGS, AdaptiveSettings(mode="uniform"), AdaptiveSettings(mode="base"))
    ]
    requests = [
        segment_request(image_of(domain), settings=settings, maps=frozenset(["confidence"]))
        for domain, settings in cases
    ]
    together = segment(engine, *requests)
    assert max(result.batch_size for result in together) > 1
    for request, (domain, settings), batched in zip(requests, cases, together, strict=True):
        offline = loaded.segmenter(settings)
        [known] = offline.segment([image_of(domain)], CLASSES, maps={"confidence"})
        [alone] = segment(engine, request)
        assert alone.explanation == batched.explanation == known.explanation
        # This model's odd widths make rounding depend on the position in the batch, so that a
        # pixel whose classes tie may get either class. Its confidence is the same.
        for result in (alone, batched):
            assert np.abs(result.confidence - known.confidence).max() <= 1e-5
            assert (result.label_map == known.label_map).mean() >= 0.99
        if settings.mode == "base":  # no adapters are involved
            assert np.array_equal(alone.label_map, known.label_map)
            assert np.array_equal(alone.confidence, known.confidence)
        assert alone.generation == (None if settings.mode == "base" else 4)
        assert set(alone.timing_ms) == {"embed", "retrieve", "load", "segment", "queue"}


def test_a_damaged_adapter_is_the_only_one_out_of_service(engine, folder, library):
    [before] = segment(engine, segment_request(image_of("fog"), exclude={"day"}))
    nearest = next(iter(used(before)))
    # The adapter is in memory and in the disk cache, so its stored file is not read.
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
    [restored] = segment(engine, segment_request(image_of("day"), only={"day"}))
    assert used(restored) == {"day": library.entry("day").digest}


def test_three_failed_selections_raise_adapters_unavailable(engine, folder, library):
    for name in DOMAINS:
        blob_paths(folder, library, name)[WEIGHTS].unlink()
    nearest = AdaptiveSettings(k=1)
    error = raised(engine, segment_request(image_of("fog"), settings=nearest))
    assert (error.code, error.retry_after_s) == ("adapters_unavailable", 5.0)
    [bare] = segment(engine, segment_request(image_of("fog"), settings=nearest))
    assert bare.explanation.fallback == "every adapter is excluded or out of service"
    assert {skipped.reason for skipped in bare.skipped} == {"a stored file is missing"}
    [asked] = segment(
        engine, segment_request(image_of("fog"), settings=AdaptiveSettings(mode="base"))
    )
    assert np.array_equal(asked.label_map, bare.label_map)


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
def test_errors_have_their_codes(engine, options, code):
    assert raised(engine, segment_request(image_of("fog"), **options)).code == code


def test_too_many_concurrent_images_are_rejected(folder, models):
    config = service_config(models, {"main": folder}, batch=1, limits=Limits(queued=3))
    with build_local_engine(config) as engine:
        assert engine.wait_until_ready(60.0)
        results = segment(engine, *[segment_request(image_of("fog")) for _ in range(12)])
    codes = [result.code for result in results if isinstance(result, ServiceError)]
    assert codes == ["overloaded"] * 8
    assert sum(not isinstance(result, ServiceError) for result in results) == 4


def test_cancelling_stops_the_work_and_unpins_the_adapters(engine):
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
    assert first.batch_size >= 1
    assert all(isinstance(result, asyncio.CancelledError) or result.batch_size for result in rest)
    [again] = segment(engine, segment_request(image_of("fog")))
    assert np.array_equal(again.label_map, first.label_map)
    assert not any(slot.pins for slot in engine.stage.cache._slots.values())


def test_readiness_lists_libraries_that_are_not_loaded(models, folder, tmp_path):
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


def test_views_have_no_paths(engine, folder, models):
    base = asyncio.run(engine.base())
    known = load_base(models[0])
    assert (base["name"], base["digest"]) == ("base.safetensors", known.digest)
    assert base["encoder"]["id"] == load_clip(models[1]).encoder_id
    assert base["settings"] == {"top_k": 5, "temperature": 0.05}
    view = asyncio.run(engine.catalog("main"))
    assert [adapter.name for adapter in view.adapters] == sorted(DOMAINS)
    assert (view.generation, view.incompatible, view.problem) == (4, 0, None)
    card = asyncio.run(engine.card("main", "fog"))
    assert (card["version"], card["label_space"]) == (1, list(CLASSES))
    assert "centroids" not in card
    text = json.dumps([base, card, repr(view)])
    assert str(folder.parent) not in text
    with pytest.raises(ServiceError, match="no adapter 'fogg'"):
        asyncio.run(engine.card("main", "fogg"))
    with pytest.raises(ServiceError, match="no library 'x'"):
        asyncio.run(engine.catalog("x"))


def test_each_result_is_of_one_generation(engine, library, models):
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
    results = []
    while not stop.is_set() or len(results) < 16:
        domains = list(DOMAINS)
        settings = AdaptiveSettings(k=4, temperature=3.0)
        results += segment(
            engine, *[segment_request(image_of(d), settings=settings) for d in domains]
        )
    publisher.join()
    deadline = time.monotonic() + 60
    while asyncio.run(engine.catalog("main")).generation != library.generation():
        assert time.monotonic() < deadline
    for result in results:
        known = {entry.name: entry.digest for entry in library.entries(result.generation)}
        assert used(result) == known
        assert result.skipped == ()
