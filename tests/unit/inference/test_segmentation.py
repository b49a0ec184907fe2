from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from loraseg.errors import AdapterMismatchError, ServiceError
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.adapter_ref import AdapterRef, AdapterUnavailableError
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.request import SegmentRequest
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.selection import AdapterSelection, SelectedAdapter
from loraseg.library import Library
from loraseg.storage import open_store
from tests.unit.inference.tiny_service import SETTINGS, adapter_query, blob_paths, switched_library
from tests.unit.tiny import CLASSES, DOMAINS, domain_images

WEIGHTS = "adapter_model.safetensors"


class StageHarness:
    """A stage over one library, with its parts."""

    def __init__(self, folder, models, *, limit_bytes=512 * 2**20):
        self.library = Library(open_store(str(folder)))
        self.store, served = switched_library(folder)
        self.models = ModelVariants(SegmenterConfig(base=models[0]))
        source = AdapterLoader({"main": served}, self.models.base)
        self.cache = AdapterCache(source, limit_bytes=limit_bytes)
        self.stage = SegmentationStage(self.models, self.cache)

    def make_request(self, weights, *, domain="fog", attention="active", **options):
        refs = [AdapterRef.from_entry("main", self.library.entry(name)) for name in weights]
        parts = tuple(
            SelectedAdapter(ref, weight, 1.0)
            for ref, weight in zip(refs, weights.values(), strict=True)
        )
        given = {"image": domain_images(domain, 1)[0], "classes": CLASSES, **options}
        selection = AdapterSelection("fused", parts, attention=attention)
        return SegmentRequest(query=adapter_query(), selection=selection, **given)

    def run(self, *requests):
        prepared = [self.stage.prepare(request) for request in requests]
        try:
            return self.stage.run(prepared)
        finally:
            for each in prepared:
                each.release()


@pytest.fixture
def harness(folder, models):
    harness = StageHarness(folder, models)
    yield harness
    harness.stage.close()


def test_results_equal_those_of_the_segmenter(harness, folder, models):
    config = SegmenterConfig(base=models[0], encoder=models[1])
    offline = load_models(config, str(folder)).segmenter(SETTINGS)
    for domain in DOMAINS:
        image = domain_images(domain, 1)[0]
        [known] = offline.segment([image], CLASSES, maps={"confidence", "entropy"})
        weights = {used.name: used.weight for used in known.explanation.adapters}
        request = harness.make_request(
            weights, domain=domain, maps=frozenset(["confidence", "entropy"])
        )
        [done] = harness.run(request)
        assert np.array_equal(done.label_map, known.label_map)
        assert np.array_equal(done.confidence, known.confidence)
        assert np.array_equal(done.entropy, known.entropy)
        assert done.explanation.mix == known.explanation.mix
        assert (done.batch_size, set(done.timing_ms)) == (1, {"load", "segment"})


def test_requests_of_a_batch_give_the_same_results_as_alone(harness):
    requests = [
        harness.make_request({"fog": 0.5, "day": 0.5}),
        harness.make_request({}, domain="night"),
        harness.make_request(
            {"night": 0.9, "dusk": 0.1}, domain="dusk", maps=frozenset(["confidence"])
        ),
    ]
    for one, request in zip(harness.run(*requests), requests, strict=True):
        [alone] = harness.run(request)
        assert (one.label_map == alone.label_map).mean() > 0.9999
        assert one.explanation == alone.explanation
        assert (one.confidence is None) == ("confidence" not in request.maps)
        assert one.batch_size == 3


def test_all_adapters_that_cannot_be_loaded_are_reported_and_nothing_stays_pinned(harness, folder):
    paths = {name: blob_paths(folder, harness.library, name)[WEIGHTS] for name in ("fog", "day")}
    paths["fog"].unlink()
    paths["day"].write_bytes(paths["day"].read_bytes()[:-1])
    with pytest.raises(AdapterUnavailableError) as caught:
        harness.stage.prepare(harness.make_request({"fog": 0.3, "day": 0.3, "night": 0.4}))
    assert {f.name: f.kind for f in caught.value.failures} == {"fog": "missing", "day": "damaged"}
    assert str(folder) not in str(caught.value)
    assert not any(slot.pins for slot in harness.cache._slots.values())
    [done] = harness.run(harness.make_request({"night": 1.0}))
    assert [used.name for used in done.explanation.adapters] == ["night"]


def test_an_unreachable_store_is_reported(harness):
    harness.run(harness.make_request({"fog": 1.0}))
    harness.store.is_on = False
    harness.run(harness.make_request({"fog": 1.0}))
    with pytest.raises(AdapterUnavailableError) as caught:
        harness.stage.prepare(harness.make_request({"fog": 0.5, "day": 0.5}))
    assert [(f.name, f.kind) for f in caught.value.failures] == [("day", "unreachable")]
    assert "secret-bucket" not in str(caught.value)


def test_prepared_adapters_stay_in_memory_until_they_are_released(folder, models):
    harness = StageHarness(folder, models, limit_bytes=1)
    prepared = harness.stage.prepare(harness.make_request({"fog": 0.5, "day": 0.5}))
    harness.run(harness.make_request({"night": 1.0}))
    fog, day = (harness.library.entry(name).digest for name in ("fog", "day"))
    assert fog in harness.cache
    assert day in harness.cache
    [done] = harness.stage.run([prepared])
    assert {used.digest for used in done.explanation.adapters} == {fog, day}
    prepared.release()
    prepared.release()
    harness.run(harness.make_request({"dusk": 1.0}))
    assert fog not in harness.cache
    assert harness.cache.stats().resident == 1


def test_threads_prepare_while_another_runs_the_model(harness):
    requests = [
        harness.make_request({name: 0.6, "fog": 0.4}, domain=name) for name in ("day", "night")
    ]
    known = [harness.run(request)[0] for request in requests]
    with ThreadPoolExecutor(6) as threads:
        works = [threads.submit(harness.stage.prepare, requests[index % 2]) for index in range(60)]
        ready = [(index % 2, work.result()) for index, work in enumerate(works)]
    for index, prepared in ready[::7]:
        [done] = harness.stage.run([prepared])
        assert np.array_equal(done.label_map, known[index].label_map)
    for _, prepared in ready:
        prepared.release()
    assert not any(slot.pins for slot in harness.cache._slots.values())


def test_an_error_in_the_model_does_not_affect_the_batch(harness):
    good, bad = (
        harness.make_request({"fog": 1.0}),
        harness.make_request({"day": 1.0}, image=np.zeros((8, 8), np.uint8)),
    )
    first, second, third = harness.run(good, bad, good)
    assert isinstance(second, Exception)
    assert np.array_equal(first.label_map, third.label_map)


def test_large_images_are_tiled_unless_tiling_is_never(harness):
    large = np.tile(domain_images("fog", 1)[0], (4, 4, 1))
    auto = harness.stage.prepare(harness.make_request({"fog": 1.0}, image=large))
    assert auto.is_tiled
    assert not harness.stage.prepare(harness.make_request({}, image=large, tiling="never")).is_tiled
    assert harness.stage.prepare(harness.make_request({}, tiling="always")).is_tiled
    work = harness.stage.run_tiled(auto)
    steps = 0
    while True:
        try:
            next(work)
            steps += 1
        except StopIteration as end:
            done = end.value
            break
    assert steps > 1
    assert done.tiles > 1
    assert done.label_map.shape == large.shape[:2]
    assert [used.name for used in done.explanation.adapters] == ["fog"]
    assert done.timing_ms["segment"] > 0


def test_an_untiled_image_that_exceeds_the_memory_is_refused(harness):
    # As large as limits allow, without taking the memory.
    image = np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), (6000, 6000, 3), (0, 0, 1))
    classes = tuple(f"class {index}" for index in range(100))
    request = harness.make_request({}, image=image, classes=classes, tiling="never")
    with pytest.raises(ServiceError, match="6000 x 6000 pixels with 100 classes") as caught:
        harness.stage.prepare(request)
    assert caught.value.code == "invalid"


def test_both_attention_variants_share_weights_and_equal_separately_loaded_models(
    harness, models, folder
):
    one, other = harness.stage.runner("active"), harness.stage.runner("inert")
    assert harness.stage.runner("inert") is other
    assert one is not other
    for name, weight in one.predictor.base.model.state_dict().items():
        twin = other.predictor.base.model.state_dict()[name]
        assert weight.data_ptr() == twin.data_ptr()
        assert torch.equal(weight, twin)
    for kind in ("active", "inert"):
        config = SegmenterConfig(base=models[0], encoder=models[1], clip_attention_lora=kind)
        offline = load_models(config, str(folder)).segmenter(SETTINGS)
        image = domain_images("fog", 1)[0]
        [known] = offline.segment([image], CLASSES, maps={"confidence"})
        weights = {used.name: used.weight for used in known.explanation.adapters}
        options = {"attention": kind, "maps": frozenset(["confidence"])}
        [done] = harness.run(harness.make_request(weights, **options))
        assert np.array_equal(done.confidence, known.confidence)
        [bare] = harness.run(harness.make_request({}, **options))
        [plain] = harness.run(harness.make_request({}, attention=None, maps=options["maps"]))
        assert np.array_equal(bare.confidence, plain.confidence)


def test_a_forced_attention_state_overrides_the_adapters(models):
    config = SegmenterConfig(base=models[0], clip_attention_lora="inert")
    cache = AdapterCache(lambda ref: pytest.fail("nothing to load"))
    stage = SegmentationStage(ModelVariants(config), cache, mode="sliding")
    runner = stage.runner("active")
    assert runner is stage.runner(None) is stage.runner("inert")
    assert runner.predictor.base.model.config.clip_attention_lora == "inert"
    assert runner.predictor.mode == "sliding"


def test_an_adapter_with_another_digest_than_selected_is_refused(harness):
    request = harness.make_request({"fog": 1.0})
    entry = request.selection.adapters[0].entry
    day = harness.library.entry("day")
    wrong = AdapterRef(
        "main", "fog", 1, day.digest, entry.record_digest, entry.base_digest, entry.size_bytes
    )
    part = SelectedAdapter(wrong, 1.0, 1.0)
    lying = replace(request, selection=AdapterSelection("fused", (part,), attention="active"))
    with pytest.raises(AdapterUnavailableError) as caught:
        harness.stage.prepare(lying)
    assert caught.value.failures[0].kind == "damaged"
    assert not issubclass(AdapterUnavailableError, AdapterMismatchError)
