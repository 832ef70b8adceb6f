"""The rate of an identity, over all schedulers: token buckets in a real Redis."""

import asyncio
import time

import pytest
import redis.asyncio
from reltrace_scheduler.auth.rates import RateLimiter, Rates
from reltrace_scheduler.errors import TooFastError
from scheduler.redis_states import fill, make_room


async def wait_of(limiter: RateLimiter, units: int, identity: str = "a") -> float:
    """Return the seconds to wait; 0: the units were taken."""
    try:
        await limiter.take(identity, "jobs", units)
    except TooFastError as error:
        return error.retry_after or 0.0
    return 0.0


async def test_a_burst_then_the_rate(store: redis.asyncio.Redis) -> None:
    limiter = RateLimiter(store, Rates(jobs=1.0))
    assert [await wait_of(limiter, 1) for _ in range(2)] == [0.0] * 2
    # A refused call takes nothing.
    assert 0.5 < await wait_of(limiter, 1) <= 1.0
    wait = await wait_of(limiter, 1)
    assert 0 < wait <= 1.0
    await asyncio.sleep(wait)
    assert await wait_of(limiter, 1) == 0.0
    assert await wait_of(limiter, 1, identity="b") == 0.0


async def test_a_large_message_passes_and_is_paid_for_afterwards(
    store: redis.asyncio.Redis,
) -> None:
    limiter = RateLimiter(store, Rates(jobs=10.0))
    assert await wait_of(limiter, 1000) == 0.0
    assert 90 < await wait_of(limiter, 1) <= 98.1


async def test_a_full_redis_counts_on(store: redis.asyncio.Redis) -> None:
    """Whoever reads results makes room: no limit may keep them from it."""
    limiter = RateLimiter(store, Rates(jobs=1.0))
    await fill(store)
    try:
        assert [await wait_of(limiter, 1) for _ in range(2)] == [0.0] * 2
        assert 0.5 < await wait_of(limiter, 1) <= 1.0
    finally:
        await make_room(store)


async def test_schedulers_share_a_rate(store: redis.asyncio.Redis) -> None:
    """
    Given two schedulers and an identity that submits as fast as it can
    I expect both together to let through the burst and the rate, and not twice as much.
    """
    rate, limiters = 50.0, [RateLimiter(store, Rates(jobs=50.0)) for _ in range(2)]
    began, passed = time.monotonic(), 0
    while time.monotonic() - began < 0.5:
        for limiter in limiters:
            passed += await wait_of(limiter, 1) == 0.0
    seconds = time.monotonic() - began
    assert 2 * rate <= passed <= 2 * rate + rate * seconds + 1


async def test_without_a_limit_redis_is_not_asked() -> None:
    nowhere = redis.asyncio.Redis(port=1)
    await RateLimiter(nowhere, Rates(requests=1.0)).take("a", "jobs", 1000)
    with pytest.raises(redis.exceptions.ConnectionError):
        await RateLimiter(nowhere, Rates(jobs=1.0)).take("a", "jobs", 1)
    await nowhere.aclose()


async def test_a_bucket_that_is_full_again_is_forgotten(store: redis.asyncio.Redis) -> None:
    await RateLimiter(store, Rates(jobs=100.0)).take("a", "jobs", 5)
    (key,) = [key async for key in store.scan_iter("reltrace:rate:*")]
    assert 0 < await store.pttl(key) <= 50
