"""WorkerService: one stream per worker, for as long as it lives."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import Message
from reltrace_proto.protocol import protocol_fault
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import worker_pb2, worker_pb2_grpc

from reltrace_scheduler.api.leasing import POLL, EmptyQueueCache
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.api.worker_session import Session
from reltrace_scheduler.errors import OutdatedError, invalid
from reltrace_scheduler.keys import REAPER
from reltrace_scheduler.limits import MAX_WORKER_MODELS
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.tasks import end

Context = grpc.aio.ServicerContext[Any, Any]
Responses = asyncio.Queue[worker_pb2.WorkResponse | None]

_HELLO_DEADLINE = 10.0
_LONGEST_NAME, _MOST_NAMES = 256, 256
_AGE_JITTER = (0.75, 1.25)
_RECONNECT_DEADLINE = 10.0


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self, store: Store, models: ModelCache, signals: Signals, counts: Counts, spans: Spans
    ) -> None:
        self._store = store
        self._models = models
        self._signals = signals
        self._empty = EmptyQueueCache(signals)
        self._counts = counts
        self._spans = spans

    async def Work(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.WorkRequest], context: Context
    ) -> AsyncIterator[worker_pb2.WorkResponse]:
        requests = aiter(request_iterator)
        hello = await _receive_hello(requests)
        session = Session(hello, self._store, self._models, self._empty, self._counts, self._spans)
        leasing, heartbeat = session.leasing, self._store.settings.heartbeat
        # Bounded: a worker that does not read stops being read.
        responses: Responses = asyncio.Queue(64)
        await responses.put(await session.open())
        shards = self._store.shards.all
        revoked_channels = [shard.key("revoked", session.worker_id) for shard in shards]
        async with (
            self._signals.listen(*(source.channel for source in leasing.sources)) as wake,
            self._signals.listen(*revoked_channels) as revoked,
        ):

            async def receive() -> None:
                async for request in requests:
                    if request.HasField("leave"):
                        await session.leave()
                        break
                    for response in await session.handle(request):
                        await responses.put(response)
                    # The worker announces by `ready` how much room its results make. But if it
                    # had room before, a bound on what it holds (its share, or that of batch jobs)
                    # limited the last lease, and it holds less now.
                    if not request.HasField("results") or leasing.has_room:
                        wake.set()
                await responses.put(None)

            async def dispatch() -> None:
                age = self._store.settings.connection_age * random.uniform(*_AGE_JITTER)
                over = time.monotonic() + age
                while (left := over - time.monotonic()) > 0:
                    if leases := await session.lease():
                        await responses.put(leases)
                    else:
                        await wake.wait_and_clear(min(POLL, left))
                # What was leased is sent by now, and what is still to come will be answered. Before
                # version 1 workers do not know the request, and would only be idle meanwhile.
                if hello.protocol > 0:
                    await responses.put(worker_pb2.WorkResponse(reconnect=worker_pb2.Reconnect()))
                    await asyncio.sleep(_RECONNECT_DEADLINE)
                await responses.put(None)

            async def revoke() -> None:
                while True:
                    # After a missed signal, the next heartbeat tells the worker.
                    if await revoked.wait_and_clear(heartbeat):
                        for response in await session.check():
                            await responses.put(response)

            tasks = [asyncio.create_task(work()) for work in (receive, dispatch, revoke)]
            for task in tasks:
                task.add_done_callback(lambda done: _end_on_failure(done, responses))
            try:
                while (response := await responses.get()) is not None:
                    yield response
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.result()
            finally:
                await end(tasks)


def _end_on_failure(task: "asyncio.Task[None]", responses: Responses) -> None:
    """Wake the writer, which waits for responses, when a task failed."""
    if task.cancelled() or task.exception() is None:
        return
    if responses.full():
        # The stream ends anyway; jobs that this response leases are queued again.
        responses.get_nowait()
    responses.put_nowait(None)


async def _receive_hello(requests: AsyncIterator[worker_pb2.WorkRequest]) -> worker_pb2.Hello:
    try:
        async with asyncio.timeout(_HELLO_DEADLINE):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise invalid("hello", f"did not come within {_HELLO_DEADLINE:.0f} s") from None
    if first.WhichOneof("message") != "hello":
        raise invalid("hello", "must be the first message")
    hello = first.hello
    if fault := protocol_fault(f"this worker (reltrace {hello.version})", hello.protocol):
        raise OutdatedError(fault)
    if not re.fullmatch(r"[\w.:-]{1,128}", hello.worker_id) or hello.worker_id == REAPER:
        raise invalid("hello.worker_id", "must be 1 to 128 letters, digits, or any of ._:-")
    _check_texts("hello", hello, "device", "version")
    if len(hello.further_models) >= MAX_WORKER_MODELS:
        raise invalid(
            "hello.further_models", f"one worker serves at most {MAX_WORKER_MODELS} models"
        )
    names: set[str] = set()
    for index, model in enumerate((hello.model, *hello.further_models)):
        field = f"hello.further_models[{index - 1}]" if index else "hello.model"
        # A route is NAME or NAME@REVISION; the registry keeps the routes of a worker as lines.
        if not model.name or "@" in model.name:
            raise invalid(f"{field}.name", "must be a name without @")
        _check_texts(field, model, "name", "revision", "architecture")
        _check_texts(field, model, "sites", "rules", "reductions", "capabilities")
        if model.name in names:
            raise invalid(f"{field}.name", f"{model.name!r} is named twice")
        names.add(model.name)
    return hello


def _check_texts(path: str, message: Message, *fields: str) -> None:
    """Raise InvalidRequestError where a text could be no name: others print what workers say."""
    for field in fields:
        value = getattr(message, field)
        texts = [value] if isinstance(value, str) else value
        if len(texts) > _MOST_NAMES:
            raise invalid(f"{path}.{field}", f"has more than {_MOST_NAMES} names")
        if not all(len(text) <= _LONGEST_NAME and text.isprintable() for text in texts):
            problem = f"must have at most {_LONGEST_NAME} characters, all of them printable"
            raise invalid(f"{path}.{field}", problem)
