"""One submission: handed in once, its results read to the end whatever the network does."""

from __future__ import annotations

import asyncio
import math
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace.storage.stored_arrays import StoredArrays, read_together
from reltrace.transport.assemble import Outcome
from reltrace.transport.connection import PASSING, Connection, Deadline, Method
from reltrace.transport.cursor import Delivery, Draft, Reader
from reltrace.transport.pending import Open
from reltrace.transport.servers import Server
from reltrace.types.atlas_shard import AtlasPart
from reltrace.types.errors import (
    DeadlineExceeded,
    MissingDependency,
    ProtocolError,
    RpcStatus,
    StoreUnreadable,
    TraceError,
    from_rejection,
    from_status,
)
from reltrace.types.request import Job

# Results are freed on the server in steps of this size, and at the end.
_ACKNOWLEDGE_BYTES = 4 * 1024 * 1024
# Nobody is kept waiting for longer at the end; the acknowledgement itself goes on.
_ACKNOWLEDGE_WAIT = 5.0

# The caller's own clock ends a call first; the server's is for callers that were killed.
_GRACE = 1
# The longest that a server takes.
_LONGEST_TIMEOUT = 31 * 24 * 3600

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
class Accepted:
    """A submission that the server has stored.

    Attributes
    ----------
    id : str
        Its id.
    positions : dict of str to int
        Index of each job, by its id.
    open : Open
        What is cancelled if its reader leaves.
    before : bool
        The server had it before, under the same key: its results may be there, or gone.
    """

    id: str
    positions: dict[str, int]
    open: Open
    before: bool


async def submit(
    connection: Connection,
    entries: Sequence[Entry],
    deadline: Deadline,
    priority: types_pb2.Priority.ValueType,
    key: str | None = None,
) -> Accepted | Rejected:
    """Hand in jobs; repeated under one idempotency key until there is an answer.

    Left early, it is cancelled on the server, also where the answer was not seen.

    Parameters
    ----------
    key : str, optional
        The idempotency key, for jobs that were perhaps handed in before; default: a new one.

    Raises
    ------
    TraceError
        If the server can not be reached, or refuses for a reason that is no single job's.
    """
    _limit_time(entries, deadline)
    _follow(entries)
    request = trace_pb2.SubmitJobsRequest(
        idempotency_key=key or str(uuid.uuid4()),
        jobs=[entry.job.spec for entry in entries],
        priority=priority,
    )
    submission = connection.leftovers.open(request)

    def send(server: Server) -> Method[trace_pb2.SubmitJobsRequest, trace_pb2.SubmitJobsResponse]:
        submission.sent = True
        return server.traces.SubmitJobs

    def refused(status: RpcStatus) -> bool:
        # No room, or an error: the server has said that it did not take the jobs.
        submission.sent = status.code in PASSING
        return status.code in _REJECTIONS

    try:
        answer = await connection.call(send, request, deadline, keep=refused)
    except BaseException:
        await connection.leftovers.leave(submission, away=deadline.away)
        raise
    if isinstance(answer, RpcStatus):
        connection.leftovers.done(submission)
        return _rejection(answer, entries, connection.address)
    connection.leftovers.accepted(submission, answer.submission_id)
    if len(answer.job_ids) != len(entries):
        await connection.leftovers.leave(submission, away=False)
        raise ProtocolError(f"{len(entries)} jobs were accepted as {len(answer.job_ids)}")
    positions = {job_id: index for index, job_id in enumerate(answer.job_ids)}
    return Accepted(answer.submission_id, positions, submission, answer.deduplicated)


def _limit_time(entries: Sequence[Entry], deadline: Deadline) -> None:
    """Let the server end the jobs of a caller who did not live to cancel them."""
    remaining = deadline.remaining()
    if remaining is None:
        return
    seconds = math.ceil(min(remaining + _GRACE, _LONGEST_TIMEOUT))
    for entry in entries:
        entry.job.spec.timeout.seconds = seconds


def _follow(entries: Sequence[Entry]) -> None:
    """Let jobs belong to the span of OpenTelemetry's that the caller is in, if there is one."""
    if "opentelemetry" not in sys.modules:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    if parent := carrier.get("traceparent"):
        for entry in entries:
            entry.job.spec.traceparent = parent


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
    drafts: Callable[[Draft], None] | None = None,
    keep: bool = False,
) -> AsyncGenerator[Delivery, None]:
    """Read the results of a submission as its jobs end, each once, and acknowledge them.

    A connection that is lost is made again, to another server if there are several, and reading
    goes on after the last chunk seen. Whatever ends the reading early, an error or the caller,
    cancels on the server the jobs that have not ended.

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
    drafts : callable, optional
        Takes what jobs that ask for it write, while they do.
    keep : bool
        Leave the results on the server: the caller has `acknowledge` free them.

    Raises
    ------
    TraceError
        If the results can not be had.
    """
    reader = Reader(accepted.positions, entries)
    acknowledger = None if keep else _Acknowledger(connection, accepted.id)
    retries = connection.retries(deadline)
    expired = False
    try:
        while True:
            server, metadata = connection.server(), connection.metadata
            call = server.traces.StreamResults(
                trace_pb2.StreamResultsRequest(
                    submission_id=accepted.id,
                    after_entry=reader.last_entry,
                    after_chunk=reader.chunks_seen,
                    drafts_of=reader.unfinished if drafts else (),
                ),
                timeout=deadline.remaining(),
                metadata=metadata,
            )
            try:
                async for response in call:
                    # While it closes, what it cancelled itself would look like a result.
                    connection.check_open()
                    retries.succeeded()
                    server.succeeded()
                    if drafts is not None:
                        for draft in filter(None, map(reader.draft, response.drafts)):
                            drafts(draft)
                    for event in response.events:
                        if (delivery := reader.take(event)) is not None:
                            _check_time(delivery, deadline)
                            if stored := _to_fetch(delivery, entries[delivery.index].job):
                                # A message names many times what it could hold itself.
                                if room is not None:
                                    await room()
                                delivery = await _fetched(delivery, stored, deadline)
                            if acknowledger is not None:
                                acknowledger.note(reader.last_entry, delivery.bytes)
                            yield delivery
                    if room is not None and reader.missing:
                        await room()
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
                expired = status.code is grpc.StatusCode.NOT_FOUND
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
            connection.leftovers.done(accepted.open)
            if acknowledger is not None:
                await acknowledger.finish()
            return
    finally:
        if reader.missing and not expired:
            await connection.leftovers.leave(accepted.open, away=deadline.away)
        else:
            connection.leftovers.done(accepted.open)


async def acknowledge(connection: Connection, accepted: Accepted) -> None:
    """Free all results of a submission on the server. Where it does not answer, they expire."""
    acknowledger = _Acknowledger(connection, accepted.id)
    acknowledger.note(len(accepted.positions), 0)
    await acknowledger.finish()


def _check_time(delivery: Delivery, deadline: Deadline) -> None:
    """Raise the caller's own error if the server was the first to see that its time is over."""
    if deadline.timeout is not None and isinstance(delivery.outcome, DeadlineExceeded):
        raise deadline.error()


def _to_fetch(delivery: Delivery, job: Job) -> list[StoredArrays]:
    """Return tensors that are kept in a store only until their result is acknowledged."""
    outcome = delivery.outcome
    if isinstance(outcome, AtlasPart):
        return [outcome.arrays] if isinstance(outcome.arrays, StoredArrays) else []
    if not isinstance(outcome, list) or job.spec.output_uri:
        return []
    return [trace.arrays for trace in outcome if isinstance(trace.arrays, StoredArrays)]


async def _fetched(
    delivery: Delivery, stored: Sequence[StoredArrays], deadline: Deadline
) -> Delivery:
    """Read the tensors of a result; the trace is then as if they had been sent."""
    found = delivery.outcome
    assert isinstance(found, list | AtlasPart)
    try:
        # The loop serves others meanwhile.
        async with asyncio.timeout(deadline.remaining()):
            # What is merged, and of a large model, is not held twice.
            copy = not isinstance(found, AtlasPart)
            arrays = await asyncio.to_thread(read_together, stored, copy)
    except (StoreUnreadable, MissingDependency) as error:
        error.job_id = None if isinstance(found, AtlasPart) else found[0].job_id
        return replace(delivery, outcome=error)
    except TimeoutError:
        raise deadline.error() from None
    size = sum(
        array.nbytes for sites in arrays for parts in sites.values() for array in parts.values()
    )
    outcome: Outcome
    if isinstance(found, AtlasPart):
        outcome = replace(found, arrays=arrays[0])
    else:
        outcome = [replace(trace, arrays=own) for trace, own in zip(found, arrays, strict=True)]
    return replace(delivery, outcome=outcome, bytes=size)


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
