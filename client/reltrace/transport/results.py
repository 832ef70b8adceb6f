"""Reads the results of a submission, over lost connections and other servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

import grpc
import grpc.aio
from reltrace_proto.stores import is_opened_unasked
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace.storage.stored_arrays import StoredArrays, StoredLocation, read_together
from reltrace.transport.assemble import JobResult, OrderError, ResultCursor
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.recovery import Recovery
from reltrace.transport.retry import Deadline
from reltrace.transport.status import RpcStatus, from_status
from reltrace.types.atlas_shard import AtlasShard
from reltrace.types.errors import (
    DeadlineExceeded,
    MissingDependency,
    ProtocolError,
    StoreUnreadable,
    TraceError,
)
from reltrace.types.request import Job
from reltrace.types.trace import Trace

# Results are freed on the server whenever so many bytes were received, or this long after one was
# (the server may have room for no more), and at the end.
_ACKNOWLEDGE_BYTES = 4 * 1024 * 1024
_ACKNOWLEDGE_SECONDS = 0.2


async def stream_results(
    connection: Connection,
    submission: Submission,
    jobs: Sequence[Job],
    deadline: Deadline,
    *,
    throttle: Callable[[], Awaitable[None]] | None = None,
    on_draft: Callable[[int, types_pb2.Draft], None] | None = None,
    acknowledged: bool = True,
) -> AsyncGenerator[JobResult, None]:
    """Yield the results of a submission as its jobs end, each once, and acknowledge them.

    A lost connection is replaced, by one to another server if there are several, and reading goes
    on after the last chunk received. Jobs that the server has lost are submitted again. If reading
    ends early, by an error or by the caller, the jobs that have not ended are cancelled there.

    Parameters
    ----------
    throttle : callable, optional
        Awaited before each message is read, so that the reader can slow the server down.
    on_draft : callable, optional
        Called with the index of a job and what it generated since its last draft. A draft may be
        missing.
    acknowledged : bool
        False: leave the results on the server; the caller frees them by `acknowledge`.

    Raises
    ------
    TraceError
        If the results can not be read.
    """
    cursor = ResultCursor(submission.job_ids, jobs)
    recovery = Recovery(connection, submission, cursor, jobs, deadline)
    acknowledger = _Acknowledger(connection, submission) if acknowledged else None
    retries = connection.retries(deadline)
    try:
        while cursor.unfinished:
            server, metadata = connection.choose_server(), connection.metadata
            call = server.traces.StreamResults(
                trace_pb2.StreamResultsRequest(
                    submission_id=submission.id,
                    after_entry=cursor.last_entry,
                    after_chunk=cursor.chunks_seen,
                    drafts_of=cursor.unfinished if on_draft else (),
                ),
                timeout=deadline.remaining(),
                metadata=metadata,
            )
            fault: TraceError
            try:
                async for response in call:
                    # `close` cancels jobs, which must not look like a result of theirs.
                    connection.check_open()
                    retries.succeeded()
                    server.succeeded()
                    if on_draft is not None:
                        for draft in response.drafts:
                            if (index := cursor.index_of(draft.job_id)) is not None:
                                on_draft(index, draft)
                    for event in response.events:
                        if (result := cursor.take(event)) is None:
                            continue
                        result = await _fetch_stored(
                            result,
                            jobs[result.index],
                            submission.results_url,
                            deadline,
                            throttle,
                        )
                        if acknowledger is not None and not cursor.has_gaps:
                            acknowledger.note(cursor.last_entry, result.bytes)
                        recovery.received()
                        yield result
                    if cursor.is_complete:
                        return
                    if throttle is not None and cursor.unfinished:
                        await throttle()
                fault = ProtocolError(
                    f"the server ended the results with {len(cursor.unfinished)} of {len(jobs)} "
                    "missing"
                )
            except OrderError as error:
                fault = error
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
                if status.code is not grpc.StatusCode.NOT_FOUND:
                    if status.retry_after is not None:
                        # Its store is away: the one that comes back may hold another attempt's.
                        cursor.drop_chunks()
                    await connection.wait_to_retry(retries, status, server, metadata)
                    continue
                fault = from_status(status, connection.address)
            except asyncio.CancelledError:
                connection.check_open()
                raise
            finally:
                call.cancel()
            if cursor.unfinished:
                for failure in await recovery.after(fault):
                    yield failure
    finally:
        if cursor.unfinished or cursor.is_complete:
            await connection.pending.abandon(submission, unreachable=deadline.unreachable)
        else:
            connection.pending.finished(submission)
            if acknowledger is not None:
                acknowledger.note(cursor.last_entry, 0)
                acknowledger.send()
        if acknowledger is not None:
            acknowledger.stop()


async def acknowledge(connection: Connection, submission_id: str, through_entry: int) -> None:
    """Free results on the server, up to an entry of the stream."""
    request = trace_pb2.AcknowledgeResultsRequest(
        submission_id=submission_id, through_entry=through_entry
    )
    try:
        await connection.call(
            lambda server: server.traces.AcknowledgeResults, request, Deadline(None)
        )
    except TraceError:
        # The results were received; without an acknowledgement they expire on the server.
        return


async def _fetch_stored(
    result: JobResult,
    job: Job,
    results_url: str,
    deadline: Deadline,
    throttle: Callable[[], Awaitable[None]] | None,
) -> JobResult:
    """Return a result with the tensors that a store keeps only until it is acknowledged."""
    outcome = result.outcome
    if deadline.timeout is not None and isinstance(outcome, DeadlineExceeded):
        # The server ended the job before the caller's own timeout did.
        raise deadline.error()
    parts: Sequence[Trace | AtlasShard]
    if isinstance(outcome, AtlasShard):
        parts = [outcome]
    else:
        parts = outcome if isinstance(outcome, list) else ()
    stored = [part.arrays for part in parts if isinstance(part.arrays, StoredArrays)]
    if not stored:
        return result
    # The arrays of an atlas are only read: they are not copied, so that memory has them once.
    copy = not isinstance(outcome, AtlasShard)
    try:
        _check_store(stored[0].location, job, results_url)
        if job.spec.output_uri:
            return result
        # One message may name far more bytes than a message can hold.
        if throttle is not None:
            await throttle()
        async with asyncio.timeout(deadline.remaining()):
            arrays = await asyncio.to_thread(read_together, stored, copy)
    except (StoreUnreadable, MissingDependency) as error:
        error.job_id = outcome[0].job_id if isinstance(outcome, list) else None
        return replace(result, outcome=error)
    except TimeoutError:
        raise deadline.error() from None
    size = sum(
        array.nbytes for sites in arrays for site in sites.values() for array in site.values()
    )
    if isinstance(outcome, AtlasShard):
        return replace(result, outcome=replace(outcome, arrays=arrays[0]), bytes=size)
    assert isinstance(outcome, list)
    traces = [replace(trace, arrays=own) for trace, own in zip(outcome, arrays, strict=True)]
    return replace(result, outcome=traces, bytes=size)


def _check_store(location: StoredLocation, job: Job, results_url: str) -> None:
    """Raise StoreUnreadable if a worker names another store than the caller or the server does."""
    if job.spec.output_uri:
        location.check([job.spec.output_uri], "the job's output_uri")
        return
    # A scheduler that is older than this client names none, though it may have one.
    named_by = "the server's store of large results" if results_url else "the server names no store"
    location.check([results_url] if is_opened_unasked(results_url) else [], named_by)


class _Acknowledger:
    """Frees results that have been yielded on the server, in the background."""

    def __init__(self, connection: Connection, submission: Submission) -> None:
        self._connection = connection
        self._submission = submission
        self._through = 0
        self._unfreed = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, entry: int, size: int) -> None:
        self._through = entry
        self._unfreed += size
        if self._unfreed >= _ACKNOWLEDGE_BYTES:
            self.send()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_ACKNOWLEDGE_SECONDS, self.send)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send(self) -> None:
        self.stop()
        if self._through:
            self._unfreed = 0
            self._connection.finish_in_background(
                acknowledge(self._connection, self._submission.id, self._through)
            )
