"""Ends jobs that no worker ends: cancelled, overdue, quarantined or failed too often."""

import time
from collections import Counter
from collections.abc import Sequence

from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.api.result_sizes import LESS, in_units
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Lease, LostLease, QuarantineCandidate, TerminalResult

_SHOWN_TOKENS, _SHOWN_TEXT = 40, 120

_STATE_NAMES = {
    state: name.removeprefix("JOB_STATE_") for name, state in types_pb2.JobState.items()
}


def cancelled(job_id: str, reason: str = "was cancelled") -> TerminalResult:
    return _result(job_id, None, "CANCELLED", _error(code_pb2.CANCELLED, reason))


def stalled(job_id: str) -> TerminalResult:
    return cancelled(job_id, "was cancelled: nobody read the results of its submission")


def overdue(job_id: str) -> TerminalResult:
    error = _error(code_pb2.DEADLINE_EXCEEDED, "did not end within its timeout")
    return _result(job_id, None, "FAILED", error)


def quarantined(job: QuarantineCandidate) -> TerminalResult:
    history = "; ".join(f"attempt {lost.attempt} on {lost.worker}" for lost in job.lost)
    message = f"lost its worker {len(job.lost)} times and is quarantined: {history}"
    error = _error(code_pb2.ABORTED, message)
    return _result(job.job_id, job.attempt, "QUARANTINED", error, job.lost)


def unserved(job_id: str, route: str) -> TerminalResult:
    fault = f"{route!r} has been without a worker for so long that it is not known here any more"
    error = _error(code_pb2.NOT_FOUND, f"model: {fault}")
    error.violations.add(field="model", description=fault)
    return _result(job_id, None, "FAILED", error)


def failed(lease: Lease, error: types_pb2.JobError) -> TerminalResult:
    return _result(lease.job_id, lease.attempt, "FAILED", error)


def too_large(lease: Lease, max_result_bytes: int) -> TerminalResult:
    message = (
        f"its result is larger than what goes through the queue, {in_units(max_result_bytes)} "
        f"(--max-result-bytes) or the tenant's own bound in bytes where that is less: {LESS}"
    )
    return failed(lease, _error(code_pb2.RESOURCE_EXHAUSTED, message))


async def end(store: Store, counts: Counts, results: Sequence[TerminalResult]) -> int:
    """End jobs, and note those that this ended; return how many."""
    queues = await store.queue.end(results)
    ended = [
        (types_pb2.ResultChunk.FromString(result.data), queue)
        for result, queue in zip(results, queues, strict=True)
        if queue
    ]
    await note_ended(store, counts, ended)
    return len(ended)


async def note_ended(
    store: Store,
    counts: Counts,
    ended: Sequence[tuple[types_pb2.ResultChunk, QueueName]],
    worker: str = "",
) -> None:
    """Count jobs that ended, by their last chunks, and note some for people to look at."""
    labels = Counter((q.route, q.tenant, state_name(c.end.state).lower()) for c, q in ended)
    for label, count in labels.items():
        counts.ended.labels(*label).inc(count)
    if store.recent.enabled:
        await store.recent.note([_recent_job(chunk, queue, worker) for chunk, queue in ended])


def _recent_job(
    chunk: types_pb2.ResultChunk, queue: QueueName, worker: str
) -> tuple[dict[str, object], bytes]:
    """Return what is shown of a job, with its last chunk if that is its whole result."""
    end = chunk.end
    shown = {
        "job": chunk.job_id,
        "tenant": queue.tenant,
        "model": queue.route,
        "worker": end.lost_leases[-1].worker_id if end.lost_leases else worker,
        "state": state_name(end.state),
        "at": time.time(),
        "text": "".join(chunk.header.tokens[:_SHOWN_TOKENS])[:_SHOWN_TEXT],
        "error": end.error.message,
    }
    whole = end.state == types_pb2.JOB_STATE_SUCCEEDED and chunk.number == 1 and chunk.tensors
    return shown, chunk.SerializeToString() if whole else b""


def state_name(state: types_pb2.JobState.ValueType) -> str:
    return _STATE_NAMES[state]


def lost_leases(lost: Sequence[LostLease]) -> list[types_pb2.LostLease]:
    messages = [types_pb2.LostLease(attempt=x.attempt, worker_id=x.worker) for x in lost]
    for message, lease in zip(messages, lost, strict=True):
        message.lost_at.FromMilliseconds(int(lease.lost_at * 1000))
    return messages


def _error(code: code_pb2.Code.ValueType, message: str) -> types_pb2.JobError:
    return types_pb2.JobError(code=code, message=message)


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
