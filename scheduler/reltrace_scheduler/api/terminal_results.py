"""The results of jobs that end without a worker's doing."""

import time
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.keys import model_of, tenant_of
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.recent import RecentJob
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Condemned, Ending, Lease, LostLease


def cancelled(job_id: str) -> Ending:
    """End a job that its client does not want any more."""
    return _ending(job_id, None, "CANCELLED", _error(code_pb2.CANCELLED, "was cancelled"))


def overdue(job_id: str) -> Ending:
    """End a job that did not end within its timeout."""
    error = _error(code_pb2.DEADLINE_EXCEEDED, "did not end within its timeout")
    return _ending(job_id, None, "FAILED", error)


def abandoned(job_id: str) -> Ending:
    """End a job of a submission whose results nobody reads."""
    error = _error(code_pb2.CANCELLED, "was cancelled: nobody read the results of its submission")
    return _ending(job_id, None, "CANCELLED", error)


def quarantined(job: Condemned) -> Ending:
    """End a job that lost too many leases."""
    history = "; ".join(f"attempt {lost.attempt} on {lost.worker}" for lost in job.lost)
    message = f"lost its worker {len(job.lost)} times and is quarantined: {history}"
    error = _error(code_pb2.ABORTED, message)
    return _ending(job.job_id, job.attempt, "QUARANTINED", error, job.lost)


def exhausted(lease: Lease, error: types_pb2.JobError) -> Ending:
    """End a job whose attempts keep failing, with the error of the last one."""
    return _ending(lease.job_id, lease.attempt, "FAILED", error)


async def end(store: Store, counts: Counts, endings: Sequence[Ending]) -> int:
    """End jobs from outside, count and note those that this ended; return how many."""
    queues = await store.end(endings)
    ended = [(ending, queue) for ending, queue in zip(endings, queues, strict=True) if queue]
    for ending, queue in ended:
        counts.ended.labels(model_of(queue), tenant_of(queue), ending.state.lower()).inc()
    if store.recent.enabled:
        await store.recent.note([_recent(ending, queue) for ending, queue in ended])
    return len(ended)


def _recent(ending: Ending, queue: str) -> RecentJob:
    chunk = types_pb2.ResultChunk.FromString(ending.data)
    lost = chunk.end.lost_leases
    return RecentJob(
        job=ending.job_id,
        tenant=tenant_of(queue),
        model=model_of(queue),
        worker=lost[-1].worker_id if lost else "",
        state=ending.state,
        at=time.time(),
        error=chunk.end.error.message,
    )


def wire_losses(lost: Sequence[LostLease]) -> list[types_pb2.LostLease]:
    """Return lost leases as they travel."""
    losses = []
    for lease in lost:
        at = Timestamp()
        at.FromMilliseconds(int(lease.lost_at * 1000))
        losses.append(
            types_pb2.LostLease(attempt=lease.attempt, worker_id=lease.worker, lost_at=at)
        )
    return losses


def _error(code: int, message: str) -> types_pb2.JobError:
    return types_pb2.JobError(code=code, message=message)


def _ending(
    job_id: str,
    attempt: int | None,
    state: str,
    error: types_pb2.JobError,
    lost: Sequence[LostLease] = (),
) -> Ending:
    chunk = types_pb2.ResultChunk(
        job_id=job_id,
        number=1,
        end=types_pb2.JobEnd(
            state=types_pb2.JobState.Value(f"JOB_STATE_{state}"),
            attempt=attempt or 0,
            error=error,
            lost_leases=wire_losses(lost),
        ),
    )
    return Ending(job_id, attempt, state, chunk.SerializeToString())
