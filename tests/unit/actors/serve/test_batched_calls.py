"""Bundling, and what happens to those whose replica is lost; replicas are plain generators here."""

import asyncio
import time

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from actors.serve.batched_calls import CallBatcher
from loraseg.errors import ConfigError, ServiceError, StageError


class FakeResponseStream:
    """What a handle gives for a call: answers after a while, or an error."""

    def __init__(self, items, answer):
        self.items, self._answer = items, answer
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True

    async def __aiter__(self):
        async for answers in self._answer(self.items):
            yield answers


class FakeReplica:
    """Notes each call; answers an item with twice its value, unless told otherwise."""

    def __init__(self):
        self.calls = []
        self.free = asyncio.Event()
        self.free.set()
        self.lost = 0
        self.hangs_after_loss = False

    def call(self, items):
        reply = FakeResponseStream(items, self._respond)
        self.calls.append(reply)
        return reply

    @property
    def batches(self):
        return [call.items for call in self.calls]

    async def _respond(self, items):
        await self.free.wait()
        if self.lost:
            self.lost -= 1
            if self.hangs_after_loss:
                self.free.clear()
            raise ActorDiedError()
        yield [(index, expected_result(item)) for index, item in enumerate(items)]


def expected_result(item):
    return ConfigError(f"no {item}") if item < 0 else 2 * item


def deadline_in(seconds=5.0):
    return time.time() + seconds


def run_scenario(scenario, **options):
    async def main():
        replica = FakeReplica()
        carrier = CallBatcher(
            replica.call, name="stage", **{"max_batch_size": 4, "linger_s": 0.05, **options}
        )
        return await scenario(carrier, replica)

    return asyncio.run(main())


def test_what_comes_at_the_same_time_goes_in_one_call_and_answers_find_their_way():
    async def scenario(carrier, replica):
        answers = await asyncio.gather(
            *(carrier.submit(n, key="any", deadline=deadline_in()) for n in (1, 2, 3))
        )
        assert answers == [2, 4, 6]
        assert replica.bundles == [[1, 2, 3]]

    run_scenario(scenario)


def test_no_call_takes_more_than_most_and_keys_are_kept_apart():
    async def scenario(carrier, replica):
        keys = ["a", "b", "a", None, "a", None, "a", "a"]
        await asyncio.gather(
            *(carrier.submit(n, key=key, deadline=deadline_in()) for n, key in enumerate(keys))
        )
        assert sorted(n for bundle in replica.bundles for n in bundle) == list(range(8))
        assert all(len(bundle) <= 4 for bundle in replica.bundles)
        for bundle in replica.bundles:
            assert len(bundle) == 1 or len({keys[n] for n in bundle}) == 1
        assert [3] in replica.bundles
        assert [5] in replica.bundles

    run_scenario(scenario)


def test_while_a_call_is_under_way_the_next_ones_wait_for_company():
    async def scenario(carrier, replica):
        replica.free.clear()
        first = asyncio.create_task(carrier.submit(1, key="any", deadline=deadline_in()))
        await asyncio.sleep(0.01)
        others = [
            asyncio.create_task(carrier.submit(n, key="any", deadline=deadline_in()))
            for n in (2, 3)
        ]
        await asyncio.sleep(0.01)
        assert replica.bundles == [[1]]
        replica.free.set()
        assert await asyncio.gather(first, *others) == [2, 4, 6]
        assert replica.bundles == [[1], [2, 3]]

    run_scenario(scenario, linger_s=5.0)


def test_nobody_waits_for_company_longer_than_the_linger():
    async def scenario(carrier, replica):
        replica.free.clear()
        tasks = [asyncio.create_task(carrier.submit(1, key="any", deadline=deadline_in()))]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(carrier.submit(2, key="any", deadline=deadline_in())))
        while len(replica.calls) < 2:
            await asyncio.sleep(0.01)
        replica.free.set()
        await asyncio.gather(*tasks)

    run_scenario(scenario)


def test_an_answer_that_is_an_error_belongs_to_its_item_alone():
    async def scenario(carrier, replica):
        answers = await asyncio.gather(
            *(carrier.submit(n, key="any", deadline=deadline_in()) for n in (1, -1, 3)),
            return_exceptions=True,
        )
        assert answers[0] == 2
        assert isinstance(answers[1], ConfigError)
        assert answers[2] == 6
        assert len(replica.calls) == 1

    run_scenario(scenario)


def test_what_a_lost_replica_had_in_hand_is_sent_again_one_by_one():
    async def scenario(carrier, replica):
        replica.lost = 1
        answers = await asyncio.gather(
            *(carrier.submit(n, key="any", deadline=deadline_in()) for n in (1, 2, 3))
        )
        assert answers == [2, 4, 6]
        assert replica.bundles == [[1, 2, 3], [1], [2], [3]]

    run_scenario(scenario)


def test_what_brings_down_replica_after_replica_is_given_up():
    async def scenario(carrier, replica):
        replica.lost = 100
        with pytest.raises(ServiceError, match="was lost") as caught:
            await carrier.submit(1, key="any", deadline=deadline_in())
        assert caught.value.code == "replica_lost"
        assert caught.value.retry_after_s is not None
        assert len(replica.calls) == 3

    run_scenario(scenario)


def test_after_a_loss_the_answer_at_the_deadline_says_so():
    async def scenario(carrier, replica):
        replica.lost, replica.hangs_after_loss = 1, True
        with pytest.raises(ServiceError) as caught:
            await carrier.submit(1, key="any", deadline=deadline_in(0.6))
        assert caught.value.code == "replica_lost"

    run_scenario(scenario)


def test_a_call_is_given_up_when_nobody_waits_for_any_of_its_items():
    async def scenario(carrier, replica):
        replica.free.clear()
        tasks = [
            asyncio.create_task(carrier.submit(n, key="any", deadline=deadline_in()))
            for n in (1, 2)
        ]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert not replica.calls[0].is_cancelled
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert replica.calls[0].is_cancelled

    run_scenario(scenario)


@pytest.mark.parametrize(
    ("raised", "kind", "code"),
    [
        (BackPressureError(3, 2), ServiceError, "overloaded"),
        (ValueError("a fault"), StageError, None),
    ],
)
def test_a_call_that_fails_as_a_whole_fails_each_of_its_items(raised, kind, code):
    async def scenario(carrier, replica):
        async def fail(_):
            raise raised
            yield

        carrier = CallBatcher(
            lambda items: FakeResponseStream(items, fail),
            name="stage",
            max_batch_size=4,
            linger_s=0.01,
        )
        answers = await asyncio.gather(
            *(carrier.submit(n, key="any", deadline=deadline_in()) for n in (1, 2)),
            return_exceptions=True,
        )
        assert all(isinstance(answer, kind) for answer in answers)
        assert code in (None, *(getattr(answer, "code", None) for answer in answers))

    run_scenario(scenario)
