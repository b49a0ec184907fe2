"""The lane over a stage whose every step the test allows or forbids."""

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

# A task's number is told from the height of its image, also in its answer.
_OFFSET = 8


class GatedStage(SegmentationStage):
    """Task 12 cannot be prepared, 13 breaks, 14 breaks unexpectedly; tiled work has four pauses."""

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
        answers = super().run(prepared)
        return [
            StageError("thirteen") if n == 13 else answer
            for n, answer in zip(numbers, answers, strict=True)
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
def shared(models):
    return ModelVariants(SegmenterConfig(base=models[0], clip_attention_lora="active"))


@pytest.fixture
def stage(shared):
    return GatedStage(shared)


@pytest.fixture
def lane(stage):
    lane = MicroBatcher(stage, max_batch_size=4, max_wait_s=0.0, max_in_flight=64)
    yield lane
    stage.may_run.set()
    stage.may_prepare.set()
    lane.close()
    assert len(stage.released) == len(stage.prepared)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def block_model(lane, stage):
    """Keep the model busy until ``may_run`` is set."""
    stage.may_run.clear()
    first = lane.submit(make_request(0))
    wait_until(lambda: stage.prepared and not lane._ready)
    return first


def submit_in_order(lane, tasks):
    """Submit in this order, whichever thread prepares."""
    futures = []
    for one in tasks:
        before = len(lane._ready) + len(lane._tiled)
        futures.append(lane.submit(one))
        wait_until(lambda before=before: len(lane._ready) + len(lane._tiled) > before)
    return futures


def test_everybody_gets_the_own_answer(lane):
    futures = {value: lane.submit(make_request(value)) for value in range(20, 40)}
    assert all(result_number(future) == value for value, future in futures.items())
    assert lane.in_flight == 0
    assert lane.stalled_s == 0.0


def test_those_of_one_group_go_together_the_oldest_first(lane, stage):
    block_model(lane, stage)
    values = [(1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "b"), (6, "a"), (7, "a")]
    futures = submit_in_order(
        lane, [make_request(value, classes=(name,)) for value, name in values]
    )
    stage.may_run.set()
    assert [f.result(60).batch_size for f in futures] == [4, 2, 4, 4, 2, 4, 1]
    assert stage.batches[1:] == [(("a",), [1, 3, 4, 6]), (("b",), [2, 5]), (("a",), [7])]


def test_the_first_of_a_batch_waits_for_company_but_not_for_ever(stage):
    lane = MicroBatcher(stage, max_batch_size=4, max_wait_s=0.5, max_in_flight=64)
    futures = [lane.submit(make_request(value)) for value in range(4)]
    assert [f.result(60).batch_size for f in futures] == [4, 4, 4, 4]
    assert lane.submit(make_request(5)).result(60).batch_size == 1
    lane.close()


def test_batches_are_bounded_by_the_memory_of_their_scores(lane, stage, monkeypatch):
    monkeypatch.setattr("loraseg.inference.batcher._MAX_BATCH_SCORE_BYTES", 2 * 4 * 10 * 9)
    block_model(lane, stage)
    futures = submit_in_order(lane, [make_request(value) for value in range(3)])
    stage.may_run.set()
    assert [f.result(60).batch_size for f in futures] == [2, 2, 1]


def test_an_error_is_that_of_its_own_task(lane, stage):
    block_model(lane, stage)
    good, bad, other = submit_in_order(lane, [make_request(1), make_request(13), make_request(2)])
    unready = lane.submit(make_request(12))
    stage.may_run.set()
    assert (result_number(good), result_number(other)) == (1, 2)
    with pytest.raises(StageError, match="thirteen"):
        bad.result(60)
    with pytest.raises(StageError, match="twelve"):
        unready.result(60)


def test_an_unexpected_error_ends_the_batch_and_not_the_lane(lane, stage):
    block_model(lane, stage)
    futures = submit_in_order(lane, [make_request(14), make_request(2)])
    stage.may_run.set()
    for future in futures:
        with pytest.raises(RuntimeError, match="fourteen"):
            future.result(60)
    assert result_number(lane.submit(make_request(3))) == 3


def test_what_is_cancelled_is_not_computed(lane, stage):
    block_model(lane, stage)
    first, second, third = submit_in_order(
        lane, [make_request(1), make_request(2), make_request(3, tiling="always")]
    )
    assert first.cancel()
    assert third.cancel()
    stage.may_run.set()
    assert result_number(second) == 2
    with pytest.raises(CancelledError):
        first.result(60)
    assert [marks for _, marks in stage.batches] == [[0], [2]]
    assert stage.steps == []
    assert lane.in_flight == 0


def test_what_is_cancelled_while_its_adapters_load_lets_go_of_them(lane, stage):
    stage.may_prepare.clear()
    future = lane.submit(make_request(1))
    wait_until(lambda: lane._prepare_pool._threads)
    future.cancel()
    stage.may_prepare.set()
    assert result_number(lane.submit(make_request(2))) == 2
    wait_until(lambda: len(stage.released) == len(stage.prepared) == 2)


def test_what_is_past_its_deadline_is_dropped_and_told_so(lane, stage):
    block_model(lane, stage)
    late, tiled = submit_in_order(
        lane, [make_request(1, in_s=0.2), make_request(3, in_s=0.2, tiling="always")]
    )
    gone = lane.submit(make_request(2, in_s=-1.0))
    time.sleep(0.3)
    stage.may_run.set()
    for future in (late, tiled, gone):
        with pytest.raises(ServiceError) as caught:
            future.result(60)
        assert caught.value.code == "deadline"
    assert [marks for _, marks in stage.batches] == [[0]]


def test_a_tiled_image_lets_others_pass(lane, stage):
    block_model(lane, stage)
    tiled, *plain = submit_in_order(
        lane,
        [
            make_request(1, tiling="always"),
            *(make_request(v, classes=(str(v),)) for v in range(2, 6)),
        ],
    )
    stage.may_run.set()
    assert [result_number(f) for f in plain] == [2, 3, 4, 5]
    assert result_number(tiled) == 1
    assert [step for _, step in stage.steps] == [0, 1, 2, 3]


def test_two_tiled_images_go_in_turns_a_third_waits(lane, stage):
    block_model(lane, stage)
    futures = submit_in_order(lane, [make_request(value, tiling="always") for value in (1, 2, 3)])
    stage.may_run.set()
    assert [result_number(f) for f in futures] == [1, 2, 3]
    order = [value for value, _ in stage.steps]
    assert order[:8] in ([1, 2] * 4, [2, 1] * 4)
    assert order[8:] == [3] * 4


def test_a_tiled_image_that_breaks_or_is_given_up_ends(lane, stage):
    with pytest.raises(StageError, match="thirteen"):
        lane.submit(make_request(13, tiling="always")).result(60)
    block_model(lane, stage)
    [tiled] = submit_in_order(lane, [make_request(1, tiling="always")])
    stage.may_run.set()
    wait_until(lambda: stage.steps[-1][0] == 1)
    tiled.cancel()
    assert result_number(lane.submit(make_request(2))) == 2
    wait_until(lambda: not lane._tiled)


def test_too_many_are_refused(stage):
    lane = MicroBatcher(stage, max_batch_size=1, max_wait_s=0.0, max_in_flight=2)
    stage.may_run.clear()
    futures = [lane.submit(make_request(value)) for value in range(2)]
    with pytest.raises(ServiceError, match="2 images are waiting") as caught:
        lane.submit(make_request(2))
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1.0)
    stage.may_run.set()
    assert [result_number(f) for f in futures] == [0, 1]
    assert result_number(lane.submit(make_request(2))) == 2
    lane.close()


def test_closing_finishes_what_runs_and_refuses_the_rest(stage):
    lane = MicroBatcher(stage, max_batch_size=1, max_wait_s=0.0, max_in_flight=8)
    first = block_model(lane, stage)
    waiting = submit_in_order(lane, [make_request(1), make_request(2, tiling="always")])
    closing = threading.Thread(target=lane.close)
    closing.start()
    wait_until(lambda: lane._is_closed)
    stage.may_run.set()
    closing.join(20)
    assert result_number(first) == 0
    for future in waiting:
        with pytest.raises(ServiceError, match="shutting down"):
            future.result(60)
    with pytest.raises(ServiceError, match="shutting down") as caught:
        lane.submit(make_request(3))
    assert caught.value.code == "draining"


def test_a_model_that_hangs_can_be_told(lane, stage):
    block_model(lane, stage)
    wait_until(lambda: lane.stalled_s > 0.05)
    stage.may_run.set()
    wait_until(lambda: lane.stalled_s == 0.0)
