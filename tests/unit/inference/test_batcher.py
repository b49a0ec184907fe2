"""The batcher over a stage whose steps the test can block."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from loraseg.errors import ServiceError, StageError
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.request import SegmentRequest
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.selection import AdapterQuery, AdaptiveSettings

# The height of an image is the number of its request plus this offset, also in its result.
_OFFSET = 8


class GatedStage(SegmentationStage):
    """Request 12 cannot be prepared, 13 fails, 14 raises a bug; tiled images yield four times."""

    def __init__(self, models):
        cache = AdapterCache(lambda ref: pytest.fail("nothing to load"))
        super().__init__(models, cache)
        self.batches, self.prepared, self.released, self.steps = [], [], [], []
        self.may_run, self.may_prepare = threading.Event(), threading.Event()
        self.may_run.set()
        self.may_prepare.set()

    def prepare(self, task):
        self.may_prepare.wait(60)
        if number(task.image) == 12:
            raise StageError("twelve cannot be prepared")
        ready = super().prepare(task)
        ready._pins.callback(self.released.append, ready)
        self.prepared.append(ready)
        return ready

    def run(self, prepared):
        self.may_run.wait(60)
        numbers = [number(ready.request.image) for ready in prepared]
        self.batches.append((prepared[0].request.classes, numbers))
        if 14 in numbers:
            raise RuntimeError("fourteen")
        results = super().run(prepared)
        return [
            StageError("thirteen") if n == 13 else result
            for n, result in zip(numbers, results, strict=True)
        ]

    def run_tiled(self, prepared):
        for step in range(4):
            self.may_run.wait(60)
            self.steps.append((number(prepared.request.image), step))
            if number(prepared.request.image) == 13:
                raise StageError("thirteen")
            yield
        return (yield from super().run_tiled(prepared))


def number(array):
    return array.shape[0] - _OFFSET


def result_number(future):
    return number(future.result(60).label_map)


def make_request(value, *, classes=("a",), tiling="never", in_s=60.0):
    return SegmentRequest(
        image=np.full((value + _OFFSET, 9, 3), 9, np.uint8),
        classes=classes,
        query=AdapterQuery(settings=AdaptiveSettings(mode="base")),
        tiling=tiling,
        deadline=time.time() + in_s,
    )


@pytest.fixture(scope="module")
def model_variants(models):
    return ModelVariants(SegmenterConfig(base=models[0], clip_attention_lora="active"))


@pytest.fixture
def stage(model_variants):
    return GatedStage(model_variants)


@pytest.fixture
def batcher(stage):
    batcher = MicroBatcher(stage, max_batch_size=4, max_wait_s=0.0, max_in_flight=64)
    yield batcher
    stage.may_run.set()
    stage.may_prepare.set()
    batcher.close()
    assert len(stage.released) == len(stage.prepared)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def block_model(batcher, stage):
    """Block the model until ``may_run`` is set."""
    stage.may_run.clear()
    first = batcher.submit(make_request(0))
    wait_until(lambda: stage.prepared and not batcher._ready)
    return first


def submit_in_order(batcher, requests):
    """Submit requests so that they become ready in this order."""
    futures = []
    for one in requests:
        before = len(batcher._ready) + len(batcher._tiled)
        futures.append(batcher.submit(one))
        wait_until(lambda before=before: len(batcher._ready) + len(batcher._tiled) > before)
    return futures


def test_each_request_gets_its_own_result(batcher):
    futures = {value: batcher.submit(make_request(value)) for value in range(20, 40)}
    assert all(result_number(future) == value for value, future in futures.items())
    assert batcher.in_flight == 0
    assert batcher.stalled_s == 0.0


def test_requests_with_the_same_key_share_a_batch_oldest_first(batcher, stage):
    block_model(batcher, stage)
    values = [(1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "b"), (6, "a"), (7, "a")]
    futures = submit_in_order(
        batcher, [make_request(value, classes=(name,)) for value, name in values]
    )
    stage.may_run.set()
    assert [f.result(60).batch_size for f in futures] == [4, 2, 4, 4, 2, 4, 1]
    assert stage.batches[1:] == [(("a",), [1, 3, 4, 6]), (("b",), [2, 5]), (("a",), [7])]


def test_the_first_request_of_a_batch_waits_for_others_for_a_limited_time(stage):
    batcher = MicroBatcher(stage, max_batch_size=4, max_wait_s=0.5, max_in_flight=64)
    futures = [batcher.submit(make_request(value)) for value in range(4)]
    assert [f.result(60).batch_size for f in futures] == [4, 4, 4, 4]
    assert batcher.submit(make_request(5)).result(60).batch_size == 1
    batcher.close()


def test_batches_are_limited_by_the_memory_of_their_scores(batcher, stage, monkeypatch):
    monkeypatch.setattr("loraseg.inference.batcher._MAX_BATCH_SCORE_BYTES", 2 * 4 * 10 * 9)
    block_model(batcher, stage)
    futures = submit_in_order(batcher, [make_request(value) for value in range(3)])
    stage.may_run.set()
    assert [f.result(60).batch_size for f in futures] == [2, 2, 1]


def test_an_error_reaches_only_its_own_request(batcher, stage):
    block_model(batcher, stage)
    good, bad, other = submit_in_order(
        batcher, [make_request(1), make_request(13), make_request(2)]
    )
    unready = batcher.submit(make_request(12))
    stage.may_run.set()
    assert (result_number(good), result_number(other)) == (1, 2)
    with pytest.raises(StageError, match="thirteen"):
        bad.result(60)
    with pytest.raises(StageError, match="twelve"):
        unready.result(60)


def test_an_unexpected_error_fails_the_batch_and_not_the_batcher(batcher, stage):
    block_model(batcher, stage)
    futures = submit_in_order(batcher, [make_request(14), make_request(2)])
    stage.may_run.set()
    for future in futures:
        with pytest.raises(RuntimeError, match="fourteen"):
            future.result(60)
    assert result_number(batcher.submit(make_request(3))) == 3


def test_cancelled_requests_are_not_computed(batcher, stage):
    block_model(batcher, stage)
    first, second, third = submit_in_order(
        batcher, [make_request(1), make_request(2), make_request(3, tiling="always")]
    )
    assert first.cancel()
    assert third.cancel()
    stage.may_run.set()
    assert result_number(second) == 2
    with pytest.raises(CancelledError):
        first.result(60)
    assert [marks for _, marks in stage.batches] == [[0], [2]]
    assert stage.steps == []
    assert batcher.in_flight == 0


def test_cancelling_while_adapters_load_releases_them(batcher, stage):
    stage.may_prepare.clear()
    future = batcher.submit(make_request(1))
    wait_until(lambda: batcher._prepare_pool._threads)
    future.cancel()
    stage.may_prepare.set()
    assert result_number(batcher.submit(make_request(2))) == 2
    wait_until(lambda: len(stage.released) == len(stage.prepared) == 2)


def test_requests_past_their_deadline_are_dropped_with_an_error(batcher, stage):
    block_model(batcher, stage)
    late, tiled = submit_in_order(
        batcher, [make_request(1, in_s=0.2), make_request(3, in_s=0.2, tiling="always")]
    )
    gone = batcher.submit(make_request(2, in_s=-1.0))
    time.sleep(0.3)
    stage.may_run.set()
    for future in (late, tiled, gone):
        with pytest.raises(ServiceError) as caught:
            future.result(60)
        assert caught.value.code == "deadline"
    assert [marks for _, marks in stage.batches] == [[0]]


def test_batches_run_between_the_tiles_of_an_image(batcher, stage):
    block_model(batcher, stage)
    tiled, *plain = submit_in_order(
        batcher,
        [
            make_request(1, tiling="always"),
            *(make_request(v, classes=(str(v),)) for v in range(2, 6)),
        ],
    )
    stage.may_run.set()
    assert [result_number(f) for f in plain] == [2, 3, 4, 5]
    assert result_number(tiled) == 1
    assert [step for _, step in stage.steps] == [0, 1, 2, 3]


def test_two_tiled_images_alternate_and_a_third_waits(batcher, stage):
    block_model(batcher, stage)
    futures = submit_in_order(
        batcher, [make_request(value, tiling="always") for value in (1, 2, 3)]
    )
    stage.may_run.set()
    assert [result_number(f) for f in futures] == [1, 2, 3]
    order = [value for value, _ in stage.steps]
    assert order[:8] in ([1, 2] * 4, [2, 1] * 4)
    assert order[8:] == [3] * 4


def test_a_tiled_image_that_fails_or_is_cancelled_ends(batcher, stage):
    with pytest.raises(StageError, match="thirteen"):
        batcher.submit(make_request(13, tiling="always")).result(60)
    block_model(batcher, stage)
    [tiled] = submit_in_order(batcher, [make_request(1, tiling="always")])
    stage.may_run.set()
    wait_until(lambda: stage.steps[-1][0] == 1)
    tiled.cancel()
    assert result_number(batcher.submit(make_request(2))) == 2
    wait_until(lambda: not batcher._tiled)


def test_requests_beyond_the_limit_are_refused(stage):
    batcher = MicroBatcher(stage, max_batch_size=1, max_wait_s=0.0, max_in_flight=2)
    stage.may_run.clear()
    futures = [batcher.submit(make_request(value)) for value in range(2)]
    with pytest.raises(ServiceError, match="2 images are waiting") as caught:
        batcher.submit(make_request(2))
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1.0)
    stage.may_run.set()
    assert [result_number(f) for f in futures] == [0, 1]
    assert result_number(batcher.submit(make_request(2))) == 2
    batcher.close()


def test_closing_finishes_the_running_batch_and_refuses_the_rest(stage):
    batcher = MicroBatcher(stage, max_batch_size=1, max_wait_s=0.0, max_in_flight=8)
    first = block_model(batcher, stage)
    waiting = submit_in_order(batcher, [make_request(1), make_request(2, tiling="always")])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_until(lambda: batcher._is_closed)
    stage.may_run.set()
    closing.join(20)
    assert result_number(first) == 0
    for future in waiting:
        with pytest.raises(ServiceError, match="shutting down"):
            future.result(60)
    with pytest.raises(ServiceError, match="shutting down") as caught:
        batcher.submit(make_request(3))
    assert caught.value.code == "draining"


def test_stalled_s_grows_while_the_model_hangs(batcher, stage):
    block_model(batcher, stage)
    wait_until(lambda: batcher.stalled_s > 0.05)
    stage.may_run.set()
    wait_until(lambda: batcher.stalled_s == 0.0)
