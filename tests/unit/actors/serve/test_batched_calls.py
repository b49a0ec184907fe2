"""Batching and retries of calls; the replicas are generators in this process."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from actors.serve.batched_calls import CallBatcher
from loraseg.errors import ConfigError, ServiceError, StageError


@dataclass
class Item:
    value: int
    key: str | None = "any"
    deadline: float = field(default_factory=lambda: time.time() + 5.0)


class FakeResponseStream:
    """The response stream of a deployment handle."""

    def __init__(self, items, respond):
        self.items, self._respond = items, respond
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True

    async def __aiter__(self):
        async for results in self._respond(self.items):
            yield results


class FakeReplica:
    """Records each call; the result of an item is twice its value, an error if it is negative."""

    def __init__(self):
        self.calls = []
        self.free = asyncio.Event()
        self.free.set()
        self.lost = 0
        self.hangs_after_loss = False

    def call(self, items):
        response = FakeResponseStream(items, self._respond)
        self.calls.append(response)
        return response

    @property
    def batches(self):
        return [[item.value for item in call.items] for call in self.calls]

    async def _respond(self, items):
        await self.free.wait()
        if self.lost:
            self.lost -= 1
            if self.hangs_after_loss:
                self.free.clear()
            raise ActorDiedError()
        yield [(index, expected_result(item.value)) for index, item in enumerate(items)]


def expected_result(value):
    return ConfigError(f"no {value}") if value < 0 else 2 * value


def run_scenario(scenario, **options):
    async def main():
        replica = FakeReplica()
        batcher = CallBatcher(
            replica.call,
            name="stage",
            batch_key=lambda item: item.key,
            **{"max_batch_size": 4, "linger_s": 0.05, **options},
        )
        return await scenario(batcher, replica)

    return asyncio.run(main())


def test_concurrent_items_share_a_call_and_get_their_own_results():
    async def scenario(batcher, replica):
        results = await asyncio.gather(*(batcher.submit(Item(n)) for n in (1, 2, 3)))
        assert results == [2, 4, 6]
        assert replica.batches == [[1, 2, 3]]

    run_scenario(scenario)


def test_calls_have_at_most_max_batch_size_items_of_one_key():
    async def scenario(batcher, replica):
        keys = ["a", "b", "a", None, "a", None, "a", "a"]
        await asyncio.gather(*(batcher.submit(Item(n, key)) for n, key in enumerate(keys)))
        assert sorted(n for batch in replica.batches for n in batch) == list(range(8))
        assert all(len(batch) <= 4 for batch in replica.batches)
        for batch in replica.batches:
            assert len(batch) == 1 or len({keys[n] for n in batch}) == 1
        assert [3] in replica.batches
        assert [5] in replica.batches

    run_scenario(scenario)


def test_items_wait_for_others_while_a_call_runs():
    async def scenario(batcher, replica):
        replica.free.clear()
        first = asyncio.create_task(batcher.submit(Item(1)))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher.submit(Item(n))) for n in (2, 3)]
        await asyncio.sleep(0.01)
        assert replica.batches == [[1]]
        replica.free.set()
        assert await asyncio.gather(first, *others) == [2, 4, 6]
        assert replica.batches == [[1], [2, 3]]

    run_scenario(scenario, linger_s=5.0)


def test_items_wait_at_most_the_linger_time():
    async def scenario(batcher, replica):
        replica.free.clear()
        tasks = [asyncio.create_task(batcher.submit(Item(1)))]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(batcher.submit(Item(2))))
        while len(replica.calls) < 2:
            await asyncio.sleep(0.01)
        replica.free.set()
        await asyncio.gather(*tasks)

    run_scenario(scenario)


def test_an_error_is_the_result_of_its_item_only():
    async def scenario(batcher, replica):
        results = await asyncio.gather(
            *(batcher.submit(Item(n)) for n in (1, -1, 3)),
            return_exceptions=True,
        )
        assert results[0] == 2
        assert isinstance(results[1], ConfigError)
        assert results[2] == 6
        assert len(replica.calls) == 1

    run_scenario(scenario)


def test_items_of_a_lost_replica_are_sent_again_in_their_own_calls():
    async def scenario(batcher, replica):
        replica.lost = 1
        results = await asyncio.gather(*(batcher.submit(Item(n)) for n in (1, 2, 3)))
        assert results == [2, 4, 6]
        assert replica.batches == [[1, 2, 3], [1], [2], [3]]

    run_scenario(scenario)


def test_an_item_that_kills_three_replicas_gets_an_error():
    async def scenario(batcher, replica):
        replica.lost = 100
        with pytest.raises(ServiceError, match="was lost") as caught:
            await batcher.submit(Item(1))
        assert caught.value.code == "replica_lost"
        assert caught.value.retry_after_s is not None
        assert len(replica.calls) == 3

    run_scenario(scenario)


def test_after_a_loss_the_deadline_gives_replica_lost():
    async def scenario(batcher, replica):
        replica.lost, replica.hangs_after_loss = 1, True
        with pytest.raises(ServiceError) as caught:
            await batcher.submit(Item(1, deadline=time.time() + 0.6))
        assert caught.value.code == "replica_lost"

    run_scenario(scenario)


def test_a_call_is_cancelled_when_all_its_items_are():
    async def scenario(batcher, replica):
        replica.free.clear()
        tasks = [asyncio.create_task(batcher.submit(Item(n))) for n in (1, 2)]
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
def test_an_error_of_the_call_is_the_result_of_all_its_items(raised, kind, code):
    async def scenario(batcher, replica):
        async def fail(_):
            raise raised
            yield

        batcher = CallBatcher(
            lambda items: FakeResponseStream(items, fail),
            name="stage",
            batch_key=lambda item: item.key,
            max_batch_size=4,
            linger_s=0.01,
        )
        results = await asyncio.gather(
            *(batcher.submit(Item(n)) for n in (1, 2)),
            return_exceptions=True,
        )
        assert all(isinstance(result, kind) for result in results)
        assert code in (None, *(getattr(result, "code", None) for result in results))

    run_scenario(scenario)
