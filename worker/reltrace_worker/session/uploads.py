"""Results that were sent to a scheduler, kept until it has stored them."""

import asyncio
from collections.abc import Callable
from itertools import count

import structlog
from reltrace_proto.v1 import worker_pb2

from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.messages import ended

log = structlog.get_logger()

_UNCOMMITTED_MESSAGES = 32
"""Messages that may be sent and not yet committed: at most about 32 MiB."""


class Uploads:
    """Messages of results in the order in which they are sent, over any number of connections."""

    def __init__(self, send: Callable[[worker_pb2.WorkRequest], None]) -> None:
        self._send = send
        self._uncommitted: dict[int, worker_pb2.WorkRequest] = {}
        self._slots = asyncio.Semaphore(_UNCOMMITTED_MESSAGES)
        self._ids = count(1)
        # The scheduler has no room for the first of them at present, nor for the others.
        self._deferred = False

    async def add(self, request: worker_pb2.WorkRequest) -> None:
        """Send a message of results as soon as few others are under way."""
        await self._slots.acquire()
        request.results.id = number = next(self._ids)
        self._uncommitted[number] = request
        if not self._deferred:
            self._send(request)

    def committed(self, number: int) -> set[LeaseKey]:
        """Forget a message that is stored; return the leases that it ended."""
        request = self._uncommitted.pop(number, None)
        if request is None:
            return set()
        self._slots.release()
        if self._deferred:
            self.send_all()
        return ended(request)

    def defer(self, number: int, delay: float) -> None:
        """Keep the messages until there is room for the first of them."""
        if not self._deferred:
            log.warning("results.deferred", messages=len(self._uncommitted))
        self._deferred = True
        if number == next(iter(self._uncommitted), None):
            asyncio.get_running_loop().call_later(delay, self._send_first)

    def _send_first(self) -> None:
        if self._deferred and self._uncommitted:
            self._send(next(iter(self._uncommitted.values())))

    def send_all(self) -> None:
        """Send what is uncommitted, over a new connection or once there is room again."""
        self._deferred = False
        for request in self._uncommitted.values():
            self._send(request)

    def over(self) -> set[LeaseKey]:
        """Return the leases whose last result is under way: they need no renewal."""
        if self._deferred:
            return set()
        return set[LeaseKey]().union(*map(ended, self._uncommitted.values()))
