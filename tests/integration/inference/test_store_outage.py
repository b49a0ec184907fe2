"""The local engine over S3: the store is down, comes back, and loses a blob."""

import asyncio
import time

import pytest

from loraseg.backbones.clip import load_clip
from loraseg.errors import ServiceError
from loraseg.inference.selection import AdaptiveSettings
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library import Library
from loraseg.library.records import blob_key, read_record
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from loraseg.storage import open_store
from tests.integration.faults.flaky_proxy import FlakyProxy
from tests.unit.inference.tiny_service import segment_request, service_config
from tests.unit.tiny import DOMAINS, domain_images, publish, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def proxy(s3_env, monkeypatch, tmp_path):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    with FlakyProxy(s3_env.endpoint.url).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def uri(proxy, s3_env, models):
    publish(f"{s3_env.uri}/library", load_base(models[0]), load_clip(models[1]))
    return f"{s3_env.uri}/library"


def segment(engine, domain, **options):
    async def one():
        return await engine.segment(segment_request(domain_images(domain, 1)[0], **options))

    return asyncio.run(one())


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_loaded_adapters_are_served_during_an_outage_and_the_others_after_it(
    proxy, uri, models, monkeypatch
):
    monkeypatch.setattr(LibraryWatcher, "UNREACHABLE_QUARANTINE_S", 1.0)
    with build_local_engine(service_config(models, {"main": uri})) as engine:
        assert engine.wait_until_ready(120.0)
        forced = {"only": {"fog"}, "timeout_s": 60.0}
        before = segment(engine, "fog", **forced)
        with proxy.outage():
            during = segment(engine, "fog", **forced)
            assert during.explanation == before.explanation
            with pytest.raises(ServiceError) as caught:
                segment(engine, "day", only={"day"}, timeout_s=60.0)
            assert caught.value.code == "adapters_unavailable"
            assert caught.value.retry_after_s is not None
            assert "s3://" not in str(caught.value)
            wait_until(lambda: asyncio.run(engine.catalog("main")).problem)
            view = asyncio.run(engine.catalog("main"))
            assert view.problem == "the store cannot be reached"
            assert len(view.adapters) == len(DOMAINS)
        wait_until(lambda: asyncio.run(engine.catalog("main")).problem is None)
        wait_until(lambda: not asyncio.run(engine.refresh("main")).adapters[0].unavailable)
        time.sleep(2.5)  # the adapter loader does not contact the store for 2 s
        after = segment(engine, "day", only={"day"}, timeout_s=60.0)
        assert [part.name for part in after.explanation.adapters] == ["day"]
        entry = Library(open_store(uri)).rollback("fog", 1)
        assert before.explanation.adapters[0].digest == entry.digest


def test_a_lost_blob_takes_one_adapter_out_of_service_until_it_is_published_again(
    uri, models, s3_env
):
    library, store = Library(open_store(uri)), open_store(uri)
    files, card = library.load("day")
    record = read_record(store, library.entry("day"))
    key = blob_key(record.files["adapter_model.safetensors"].sha256)
    store.delete(key)
    everything = AdaptiveSettings(k=4, temperature=3.0)
    with build_local_engine(service_config(models, {"main": uri})) as engine:
        assert engine.wait_until_ready(120.0)
        result = segment(engine, "day", settings=everything, timeout_s=120.0)
        names = {part.name for part in result.explanation.adapters}
        assert names == set(DOMAINS) - {"day"}
        assert [(s.name, s.reason) for s in result.skipped] == [("day", "a stored file is missing")]
        library.publish("day", files, card)  # restores the blob, publishes nothing new
        asyncio.run(engine.refresh("main"))
        result = segment(engine, "day", settings=everything, timeout_s=120.0)
        known = {entry.name: entry.digest for entry in library.entries()}
        used = {part.name: part.digest for part in result.explanation.adapters}
        assert used == known
        assert result.skipped == ()
