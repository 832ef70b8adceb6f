"""WorkerService: one stream per worker, for as long as it lives."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from reltrace_scheduler.api.idle_queues import LOOK_AGAIN, Idleness
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.api.worker_session import Session, duration
from reltrace_scheduler.errors import InvalidRequestError, Violation
from reltrace_scheduler.keys import REAPER
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.signals import Signals, wait
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.tasks import end

Context = grpc.aio.ServicerContext[Any, Any]

_HELLO_DEADLINE = 10.0
_MOST_MODELS = 32


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Leases jobs to workers and stores what they send back."""

    def __init__(
        self,
        store: Store,
        models: ModelCache,
        signals: Signals,
        counts: Counts,
        spans: Spans,
    ) -> None:
        self._spans = spans
        self._store = store
        self._models = models
        self._signals = signals
        self._idleness = Idleness(signals)
        self._counts = counts

    async def Work(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.WorkRequest], context: Context
    ) -> AsyncIterator[worker_pb2.WorkResponse]:
        requests = aiter(request_iterator)
        hello = await _first(requests)
        session = Session(
            hello, self._store, self._models, self._idleness, self._counts, self._spans
        )
        settings, leasing = self._store.settings, session.leasing
        await session.open()
        # Bounded: a worker that does not read stops being read.
        outgoing: asyncio.Queue[worker_pb2.WorkResponse | None] = asyncio.Queue(64)
        await outgoing.put(
            worker_pb2.WorkResponse(
                welcome=worker_pb2.Welcome(
                    lease=duration(settings.lease),
                    heartbeat=duration(settings.heartbeat),
                    results_url=self._store.results_url,
                    results_above_bytes=settings.results_above,
                    drafts=True,
                )
            )
        )
        with (
            self._signals.listen(*(source.channel for source in leasing.sources)) as wake,
            self._signals.listen(
                *(shard.keys.revoked(session.worker_id) for shard in self._store.shards)
            ) as revoked,
        ):

            async def receive() -> None:
                async for request in requests:
                    if request.HasField("leave"):
                        await session.leave()
                        break
                    for response in await session.handle(request):
                        await outgoing.put(response)
                    # Room, or an empty hand, may be what a lease waited for. The room that results
                    # make is told by the worker; but where some was left, a bound on what it holds
                    # (its share, or that of batch) kept jobs from it, and now it holds less.
                    if not request.HasField("results") or leasing.has_room:
                        wake.event.set()
                await outgoing.put(None)

            async def dispatch() -> None:
                while True:
                    leasing.wake(wake.take())
                    for leases in (messages := await session.lease()):
                        await outgoing.put(leases)
                    if not messages and not await wait(wake, LOOK_AGAIN):
                        leasing.look_again()

            async def revoke() -> None:
                while True:
                    # A signal that is missed is made up for by the worker's next heartbeat.
                    if await wait(revoked, settings.heartbeat):
                        for response in await session.check():
                            await outgoing.put(response)

            tasks = [asyncio.create_task(work()) for work in (receive, dispatch, revoke)]
            for task in tasks:
                # A failure must reach the writer below, which waits on the queue.
                task.add_done_callback(lambda done: _report(done, outgoing))
            try:
                while (response := await outgoing.get()) is not None:
                    yield response
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.result()
            finally:
                await end(tasks)


def _report(
    task: "asyncio.Task[None]", outgoing: "asyncio.Queue[worker_pb2.WorkResponse | None]"
) -> None:
    if task.cancelled() or task.exception() is None:
        return
    if outgoing.full():
        # The stream is lost anyway; what it carried is leased and comes back.
        outgoing.get_nowait()
    outgoing.put_nowait(None)


async def _first(requests: AsyncIterator[worker_pb2.WorkRequest]) -> worker_pb2.Hello:
    try:
        async with asyncio.timeout(_HELLO_DEADLINE):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidRequestError(
            Violation("hello", f"did not come within {_HELLO_DEADLINE:.0f} s")
        ) from None
    if first.WhichOneof("message") != "hello":
        raise InvalidRequestError(Violation("hello", "must be the first message"))
    hello = first.hello
    if not re.fullmatch(r"[\w.:-]{1,128}", hello.worker_id) or hello.worker_id == REAPER:
        raise InvalidRequestError(
            Violation("hello.worker_id", "must be 1 to 128 letters, digits, or any of ._:-")
        )
    if len(hello.further_models) >= _MOST_MODELS:
        raise InvalidRequestError(
            Violation("hello.further_models", f"one worker serves at most {_MOST_MODELS} models")
        )
    fields = ["hello.model", *(f"hello.further_models[{n}]" for n in range(_MOST_MODELS))]
    names: set[str] = set()
    for model, field in zip((hello.model, *hello.further_models), fields, strict=False):
        _check_model(model, field, names)
        names.add(model.name)
    return hello


def _check_model(model: types_pb2.ModelInfo, field: str, taken: set[str]) -> None:
    # A route is NAME or NAME@REVISION; routes are lines where a worker is entered.
    if not re.fullmatch(r"[^@\n]{1,256}", model.name):
        raise InvalidRequestError(
            Violation(
                f"{field}.name", "must have 1 to 256 characters, none of them @ or a new line"
            )
        )
    if not re.fullmatch(r"[^\n]{0,256}", model.revision):
        raise InvalidRequestError(
            Violation(f"{field}.revision", "must have at most 256 characters and no new line")
        )
    if model.name in taken:
        raise InvalidRequestError(Violation(f"{field}.name", f"{model.name!r} is named twice"))
