"""The results of jobs that no worker ends."""

import time
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.recent import RecentJob
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Condemned, Lease, LostLease, TerminalResult

_SHOWN_TOKENS, _SHOWN_TEXT = 40, 120


def cancelled(job_id: str, reason: str = "was cancelled") -> TerminalResult:
    error = types_pb2.JobError(code=code_pb2.CANCELLED, message=reason)
    return _result(job_id, None, "CANCELLED", error)


def stalled(job_id: str) -> TerminalResult:
    return cancelled(job_id, "was cancelled: nobody read the results of its submission")


def overdue(job_id: str) -> TerminalResult:
    message = "did not end within its timeout"
    error = types_pb2.JobError(code=code_pb2.DEADLINE_EXCEEDED, message=message)
    return _result(job_id, None, "FAILED", error)


def quarantined(job: Condemned) -> TerminalResult:
    history = "; ".join(f"attempt {lost.attempt} on {lost.worker}" for lost in job.lost)
    message = f"lost its worker {len(job.lost)} times and is quarantined: {history}"
    error = types_pb2.JobError(code=code_pb2.ABORTED, message=message)
    return _result(job.job_id, job.attempt, "QUARANTINED", error, job.lost)


def failed(lease: Lease, error: types_pb2.JobError) -> TerminalResult:
    """End a job whose attempts keep failing, with the error of the last one."""
    return _result(lease.job_id, lease.attempt, "FAILED", error)


async def end(store: Store, counts: Counts, results: Sequence[TerminalResult]) -> int:
    """End jobs; count and note those that this ended; return how many."""
    queues = await store.queue.end(results)
    ended = [(result, queue) for result, queue in zip(results, queues, strict=True) if queue]
    for result, queue in ended:
        counts.ended.labels(queue.route, queue.tenant, result.state.lower()).inc()
    if store.recent.enabled:
        chunks = [(types_pb2.ResultChunk.FromString(r.data), queue) for r, queue in ended]
        await store.recent.note([recent_job(chunk, queue) for chunk, queue in chunks])
    return len(ended)


def recent_job(
    chunk: types_pb2.ResultChunk, queue: QueueName, worker: str = ""
) -> tuple[RecentJob, bytes]:
    """Return what people are shown of a job with its last chunk, if that is its whole result."""
    end = chunk.end
    job = RecentJob(
        job=chunk.job_id,
        tenant=queue.tenant,
        model=queue.route,
        worker=end.lost_leases[-1].worker_id if end.lost_leases else worker,
        state=types_pb2.JobState.Name(end.state).removeprefix("JOB_STATE_"),
        at=time.time(),
        text="".join(chunk.header.tokens[:_SHOWN_TOKENS])[:_SHOWN_TEXT],
        error=end.error.message,
    )
    whole = end.state == types_pb2.JOB_STATE_SUCCEEDED and chunk.number == 1 and chunk.tensors
    return job, chunk.SerializeToString() if whole else b""


def lost_leases(lost: Sequence[LostLease]) -> list[types_pb2.LostLease]:
    """Return lost leases as protobuf messages."""
    messages = []
    for lease in lost:
        at = Timestamp()
        at.FromMilliseconds(int(lease.lost_at * 1000))
        messages.append(
            types_pb2.LostLease(attempt=lease.attempt, worker_id=lease.worker, lost_at=at)
        )
    return messages


def _result(
    job_id: str,
    attempt: int | None,
    state: str,
    error: types_pb2.JobError,
    lost: Sequence[LostLease] = (),
) -> TerminalResult:
    chunk = types_pb2.ResultChunk(
        job_id=job_id,
        number=1,
        end=types_pb2.JobEnd(
            state=types_pb2.JobState.Value(f"JOB_STATE_{state}"),
            attempt=attempt or 0,
            error=error,
            lost_leases=lost_leases(lost),
        ),
    )
    return TerminalResult(job_id, attempt, state, chunk.SerializeToString())
