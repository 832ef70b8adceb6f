"""One submission: handed in once, its results read to the end whatever the network does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace._errors import (
    DeadlineExceeded,
    NotFound,
    ProtocolError,
    RpcStatus,
    TraceError,
    Unavailable,
    from_rejection,
    from_status,
)
from reltrace._request import Job
from reltrace._trace import Trace
from reltrace._transport.abandon import abandon_request, abandon_submission
from reltrace._transport.assemble import Assembler
from reltrace._transport.connection import Connection, Deadline

# Results are freed on the server in steps of this size, and at the end.
_ACKNOWLEDGE_BYTES = 4 * 1024 * 1024
# Nobody is kept waiting for longer at the end; the acknowledgement itself goes on.
_ACKNOWLEDGE_WAIT = 5.0

# By so much the server is more patient than the caller, whose own deadline tells best.
_SLACK = 5.0
# The longest that a server takes.
_LONGEST_TIMEOUT = 31 * 24 * 3600.0

_REJECTIONS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class Entry:
    """A job and the id that its traces carry."""

    job: Job
    id: str | int | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Jobs that keep a submission from being accepted, by index, with their errors."""

    errors: dict[int, TraceError]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job that ended.

    Attributes
    ----------
    index : int
        Of the job in the submission.
    outcome : list of Trace or TraceError
        One trace per target, or why there is none.
    bytes : int
        Size of the tensors.
    """

    index: int
    outcome: list[Trace] | TraceError
    bytes: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A submission that the server has stored."""

    id: str
    positions: dict[str, int]


async def submit(
    connection: Connection,
    entries: Sequence[Entry],
    deadline: Deadline,
    priority: types_pb2.Priority.ValueType,
) -> Accepted | Rejected:
    """Hand in jobs; repeated under one idempotency key until there is an answer.

    Where there is a deadline, the server knows of it too: what a client that was killed leaves
    behind does not run past it.

    Raises
    ------
    TraceError
        If the server can not be reached, or refuses for a reason that is no single job's.
    """
    request = trace_pb2.SubmitJobsRequest(
        idempotency_key=str(uuid.uuid4()),
        jobs=[entry.job.spec for entry in entries],
        priority=priority,
    )
    remaining = deadline.remaining()
    if remaining is not None:
        for job in request.jobs:
            job.timeout.FromMilliseconds(int(1000 * min(remaining + _SLACK, _LONGEST_TIMEOUT)))
    try:
        answer = await connection.call(
            lambda server: server.traces.SubmitJobs,
            request,
            deadline,
            keep=lambda status: status.code in _REJECTIONS,
        )
    except (asyncio.CancelledError, DeadlineExceeded, Unavailable):
        await abandon_request(connection, request)
        raise
    if isinstance(answer, RpcStatus):
        return _rejection(answer, entries, connection.address)
    if len(answer.job_ids) != len(entries):
        raise ProtocolError(f"{len(entries)} jobs were accepted as {len(answer.job_ids)}")
    positions = {job_id: index for index, job_id in enumerate(answer.job_ids)}
    return Accepted(answer.submission_id, positions)


def _rejection(status: RpcStatus, entries: Sequence[Entry], address: str) -> Rejected:
    errors: dict[int, TraceError] = {}
    for index, violations in status.by_job().items():
        if index >= len(entries):
            raise ProtocolError(f"job {index} of {len(entries)} was rejected")
        job = entries[index].job
        errors[index] = from_rejection(status.code, violations, job.rename)
        if any(violation.field == "model" for violation in violations):
            # The name is wrong wherever it stands: no need to ask once per job.
            for other, entry in enumerate(entries):
                if entry.job.spec.model == job.spec.model:
                    errors.setdefault(other, errors[index])
    if not errors:
        raise from_status(status, address)
    return Rejected(errors)


async def deliveries(
    connection: Connection,
    accepted: Accepted,
    entries: Sequence[Entry],
    deadline: Deadline,
    room: Callable[[], Awaitable[None]] | None = None,
) -> AsyncGenerator[Delivery, None]:
    """Read the results of a submission as its jobs end, each once, and acknowledge them.

    Whoever stops before the end gives up the rest: it is cancelled on the server.

    A connection that is lost is made again, to another server if there are several, and reading
    goes on after the last chunk seen.

    Parameters
    ----------
    connection : Connection
        To the servers.
    accepted : Accepted
        The submission.
    entries : sequence of Entry
        Its jobs, in order.
    deadline : Deadline
        When to give up.
    room : callable, optional
        Awaited before each message is read: how the reader slows the server down.

    Raises
    ------
    TraceError
        If the results can not be had.
    """
    reader = _Reader(accepted, entries)
    acknowledger = _Acknowledger(connection, accepted.id)
    retries = connection.retries(deadline)
    connection.reading.add(accepted.id)
    try:
        while reader.missing:
            server, metadata = connection.server(), connection.metadata
            call = server.traces.StreamResults(
                trace_pb2.StreamResultsRequest(
                    submission_id=accepted.id,
                    after_entry=reader.last_entry,
                    after_chunk=reader.chunks_seen,
                ),
                timeout=deadline.remaining(),
                metadata=metadata,
            )
            try:
                async for response in call:
                    retries.succeeded()
                    server.succeeded()
                    if connection.closing:
                        raise TraceError("the client is closed")
                    for event in response.events:
                        if (delivery := reader.take(event)) is not None:
                            acknowledger.note(reader.last_entry, delivery.bytes)
                            yield delivery
                    if room is not None and reader.missing:
                        await room()
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
                connection.failed(server, status)
                if not connection.outdated(status, metadata):
                    await retries.after(status)
                continue
            except asyncio.CancelledError:
                connection.check_open()
                raise
            finally:
                call.cancel()
            if reader.missing:
                raise ProtocolError(
                    f"the server ended the results with {reader.missing} of {len(entries)} missing"
                )
    except NotFound:
        reader.forget()
        raise
    finally:
        connection.reading.discard(accepted.id)
        if reader.missing and not connection.closing:
            await abandon_submission(connection, accepted.id)
    await acknowledger.finish()


class _Reader:
    """Where in the results of a submission we are."""

    def __init__(self, accepted: Accepted, entries: Sequence[Entry]) -> None:
        self._positions = dict(accepted.positions)
        self._entries = entries
        self._current: Assembler | None = None
        self._current_job = ""
        self.last_entry = 0

    @property
    def chunks_seen(self) -> int:
        return 0 if self._current is None else self._current.chunks

    @property
    def missing(self) -> int:
        return len(self._positions)

    def forget(self) -> None:
        """Wait for nothing any more: the server does not know of it."""
        self._positions.clear()

    def take(self, event: trace_pb2.ResultEvent) -> Delivery | None:
        chunk = event.chunk
        index = self._positions.get(chunk.job_id)
        if index is None or event.entry <= self.last_entry:
            raise ProtocolError(f"entry {event.entry} delivers job {chunk.job_id!r} unasked")
        if self._current is None:
            self._current = Assembler(self._entries[index].job, self._entries[index].id)
            self._current_job = chunk.job_id
        elif self._current_job != chunk.job_id:
            raise ProtocolError(f"chunks of job {chunk.job_id!r} came inside another entry")
        outcome = self._current.add(chunk)
        if outcome is None:
            return None
        size = self._current.bytes
        self._current = None
        self.last_entry = event.entry
        del self._positions[chunk.job_id]
        return Delivery(index, outcome, size)


class _Acknowledger:
    """Frees results on the server that have been delivered here."""

    def __init__(self, connection: Connection, submission_id: str) -> None:
        self._connection = connection
        self._id = submission_id
        self._through = 0
        self._unfreed = 0
        self._sending: asyncio.Task[None] | None = None

    def note(self, entry: int, size: int) -> None:
        self._through = entry
        self._unfreed += size
        if self._unfreed >= _ACKNOWLEDGE_BYTES and (self._sending is None or self._sending.done()):
            self._unfreed = 0
            self._sending = asyncio.create_task(self._send())

    async def finish(self) -> None:
        task = asyncio.create_task(self._send_last(self._sending))
        self._connection.keep(task)
        await asyncio.wait({task}, timeout=_ACKNOWLEDGE_WAIT)

    async def _send_last(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        await self._send()

    async def _send(self) -> None:
        request = trace_pb2.AcknowledgeResultsRequest(
            submission_id=self._id, through_entry=self._through
        )
        try:
            await self._connection.call(
                lambda server: server.traces.AcknowledgeResults,
                request,
                Deadline(None),
            )
        except TraceError:
            # The results are here; what is not acknowledged expires on the server by itself.
            return
