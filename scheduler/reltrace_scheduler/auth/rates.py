"""How fast a caller may call: a token bucket per identity, in this scheduler's memory."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from reltrace_scheduler.auth.identity import current
from reltrace_scheduler.errors import TooFastError

_SUBMIT = "/reltrace.v1.TraceService/SubmitJobs"
_BURST = 2.0
"""Seconds of a rate that may be used up at once."""
_MAX_BUCKETS = 4096
_ROUNDING = 1e-6
"""Units; who waits for exactly as long as it was told is let through."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one identity may do per second, at one scheduler; None: no limit.

    Parameters
    ----------
    requests : float or None
        Calls, of any method; a stream counts once.
    jobs : float or None
        Jobs in submissions.
    """

    requests: float | None = None
    jobs: float | None = None


UNLIMITED = Rates()


class Buckets:
    """Token buckets by name, the least recently used ones forgotten.

    Parameters
    ----------
    rate : float
        Units per second.
    clock : callable
        Seconds that rise; for tests.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * _BURST)
        self._clock = clock
        # Name to (units left, when that was).
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, units: int) -> float:
        """Take units; return 0, or the seconds after which they can be had.

        More units than a bucket holds are given once it is full, and leave it in debt: a
        message of many jobs passes, and the ones after it wait.
        """
        now = self._clock()
        level, then = self._levels.pop(name, (self._capacity, now))
        level = min(self._capacity, level + (now - then) * self._rate)
        missing = min(float(units), self._capacity) - level
        if missing < _ROUNDING:
            missing = 0.0
        self._levels[name] = (level if missing > 0 else level - units, now)
        if len(self._levels) > _MAX_BUCKETS:
            self._levels.popitem(last=False)
        return max(0.0, missing / self._rate)

    def __len__(self) -> int:
        """Return the number of buckets held."""
        return len(self._levels)


class RateInterceptor(grpc.aio.ServerInterceptor):
    """Refuses what comes too fast; stands behind the authentication, which says who calls.

    Parameters
    ----------
    rates : Rates
        The limits.
    """

    def __init__(self, rates: Rates) -> None:
        self._requests = None if rates.requests is None else Buckets(rates.requests)
        self._jobs = None if rates.jobs is None else Buckets(rates.jobs)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Count a call of ours before it is read, and the jobs of a submission after that."""
        method = handler_call_details.method
        if not method.startswith("/reltrace."):
            return await continuation(handler_call_details)
        if self._requests is not None:
            _pass(self._requests.take(current().name, 1), "requests")
        handler = await continuation(handler_call_details)
        if handler is None or self._jobs is None or method != _SUBMIT:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            _counting(handler.unary_unary, self._jobs),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _counting(submit: Callable[..., Awaitable[Any]], jobs: Buckets) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        _pass(jobs.take(current().name, len(request.jobs)), "jobs")
        return await submit(request, context)

    return call


def _pass(wait: float, what: str) -> None:
    if wait > 0:
        raise TooFastError(
            f"{current().name!r} sends {what} faster than this server allows: "
            f"try again in {wait:.2f} s",
            wait,
        )
