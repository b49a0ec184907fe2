import asyncio

import pytest

from loraseg.errors import ServiceError
from loraseg.serving.config import Limits
from loraseg.serving.http_api.auth import Authenticator, MemoryBudget, Principal


class TestSlots:
    def test_slots_of_a_token_are_limited_and_released(self):
        authenticator = Authenticator(None, Limits())
        first, other = Principal("a", None, 2), Principal("b", None, 1)
        with (
            authenticator.acquire_slot(first),
            authenticator.acquire_slot(first),
            authenticator.acquire_slot(other),
        ):
            with (
                pytest.raises(ServiceError, match="are running") as caught,
                authenticator.acquire_slot(first),
            ):
                pass
            assert caught.value.code == "too_many_requests"
        with authenticator.acquire_slot(first), authenticator.acquire_slot(first):
            pass


class TestMemoryBudget:
    def test_requests_wait_in_order_and_never_exceed_the_budget(self):
        async def run():
            budget, held, order, peak = MemoryBudget(10), 0, [], 0

            async def work(name, size):
                nonlocal held, peak
                async with budget.reserve(size):
                    order.append(name)
                    held += min(size, 10)
                    peak = max(peak, held)
                    await asyncio.sleep(0)
                    held -= min(size, 10)

            await asyncio.gather(*(work(n, size) for n, size in enumerate([6, 6, 1, 99, 3, 3])))
            return order, peak

        order, peak = asyncio.run(run())
        assert order == [0, 1, 2, 3, 4, 5]
        assert peak <= 10

    def test_cancelled_waiters_release_nothing(self):
        async def run():
            budget = MemoryBudget(10)
            async with budget.reserve(10):
                waiting = [asyncio.ensure_future(budget.reserve(4).__aenter__()) for _ in range(3)]
                await asyncio.sleep(0)
                waiting[0].cancel()
                waiting[2].cancel()
                await asyncio.sleep(0)
            await waiting[1]
            async with asyncio.timeout(1), budget.reserve(6):
                pass

        asyncio.run(run())

    def test_cancelling_a_waiter_with_a_granted_reservation_wakes_the_next(self):
        async def run():
            budget = MemoryBudget(10)
            async with budget.reserve(10):
                granted = asyncio.ensure_future(budget.reserve(10).__aenter__())
                waiting = asyncio.ensure_future(budget.reserve(10).__aenter__())
                await asyncio.sleep(0)
            granted.cancel()
            async with asyncio.timeout(1):
                await waiting

        asyncio.run(run())
