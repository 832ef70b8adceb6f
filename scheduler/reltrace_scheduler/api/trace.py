"""TraceService: what clients call."""

import random
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

import grpc
from reltrace_proto.stores import folders_of
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.api.result_sizes import ResultLimits
from reltrace_scheduler.api.terminal_results import cancelled, end
from reltrace_scheduler.api.validation import as_sent, check_job_ids, check_submission
from reltrace_scheduler.auth.identity import current
from reltrace_scheduler.errors import (
    ResultLostError,
    SchedulerError,
    UnknownSubmissionError,
    invalid,
)
from reltrace_scheduler.keys import job_ids, submission_of
from reltrace_scheduler.limits import MAX_DRAFTED_JOBS
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.job_queue import digest
from reltrace_scheduler.queue.results import FIRST_DRAFT
from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Priority, Progress, StoredChunk, StoredDraft, Submission
from reltrace_scheduler.tasks import off_loop

Context = grpc.aio.ServicerContext[Any, Any]

_MESSAGE_BYTES = 1 << 20
"""A message is sent once it holds this much, or nothing more is there."""

_POLL, _LONGEST_POLL = 1.0, 10.0
"""Seconds between reads of the store while no signal comes, doubled with each."""

_PRIORITIES = {
    types_pb2.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    types_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    types_pb2.PRIORITY_BATCH: Priority.BATCH,
}


class TraceService(trace_pb2_grpc.TraceServiceServicer):
    def __init__(
        self, store: Store, models: ModelCache, signals: Signals, counts: Counts, spans: Spans
    ) -> None:
        self._store = store
        self._models = models
        self._signals = signals
        self._counts = counts
        self._spans = spans

    async def SubmitJobs(  # noqa: N802
        self, request: trace_pb2.SubmitJobsRequest, context: Context
    ) -> trace_pb2.SubmitJobsResponse:
        began, settings = time.monotonic(), self._store.settings
        self._spans.start_traces(request.idempotency_key, request.jobs)
        models = await self._models.get(*(job.model for job in request.jobs))
        try:
            limits = self._result_limits()
            folders = folders_of(settings.output_uri, current().tenant)
            check = partial(check_submission, request, models, limits, folders)
            jobs = await off_loop(check)
        except SchedulerError:
            # What was accepted stays accepted, also when models have come or gone since.
            before = await self._accepted_before(request)
            if before is None:
                raise
            return self._submitted(before, ())
        tenant, priority = current().tenant, _PRIORITIES[request.priority]
        submission = await self._store.queue.submit(
            jobs, tenant=tenant, priority=priority, idempotency_key=request.idempotency_key
        )
        if not submission.deduplicated:
            self._counts.submitted.labels(tenant, priority).inc(len(jobs))
        for parent in {job.traceparent for job in request.jobs} - {""}:
            self._spans.record(
                "reltrace.submit",
                parent,
                time.monotonic() - began,
                submission=submission.id,
                tenant=tenant,
                jobs=len(jobs),
            )
        return self._submitted(submission, await self._models.unserved({job.route for job in jobs}))

    def _submitted(
        self, submission: Submission, unserved: Iterable[str]
    ) -> trace_pb2.SubmitJobsResponse:
        return trace_pb2.SubmitJobsResponse(
            submission_id=submission.id,
            job_ids=submission.job_ids,
            deduplicated=submission.deduplicated,
            results_url=self._store.results_url,
            unserved=unserved,
        )

    def _result_limits(self) -> ResultLimits:
        bounds, store = self._store.bounds, self._store.results_url
        return ResultLimits(bounds.max_result_bytes, bounds.results_above if store else None)

    async def _accepted_before(self, request: trace_pb2.SubmitJobsRequest) -> Submission | None:
        priority = _PRIORITIES.get(request.priority)
        if not request.idempotency_key or priority is None:
            return None
        jobs = await off_loop(lambda: digest(map(as_sent, request.jobs), priority))
        return await self._store.queue.seen(current().tenant, request.idempotency_key, jobs)

    async def StreamResults(  # noqa: N802
        self, request: trace_pb2.StreamResultsRequest, context: Context
    ) -> AsyncIterator[trace_pb2.StreamResultsResponse]:
        submission = request.submission_id
        entry, chunk = request.after_entry, request.after_chunk
        _check_drafts(request)
        positions = dict.fromkeys(request.drafts_of, FIRST_DRAFT)
        channel, poll = self._store.shards.of(submission).key("done", submission), _POLL
        reading = self._store.results.reading(submission)
        async with reading, self._signals.listen(channel) as signal:
            while True:
                progress = await self._progress(submission)
                if progress.ended > entry:
                    chunks = self._store.results.read(submission, entry, chunk)
                    async for message in _messages(chunks):
                        yield message
                        entry = message.events[-1].entry
                    # Ended jobs that gave no event were acknowledged, or read before.
                    entry, chunk = max(entry, progress.ended), 0
                elif entry >= progress.jobs:
                    return
                else:
                    async for message in _messages(self._new_drafts(positions)):
                        yield message
                    # New results and drafts since the last read have been signalled.
                    signalled = await signal.wait_and_clear(poll * random.uniform(0.5, 1))
                    poll = _POLL if signalled else min(2 * poll, _LONGEST_POLL)

    async def _new_drafts(self, positions: dict[str, str]) -> AsyncIterator[StoredDraft]:
        """Yield the drafts after each job's position, and advance the positions."""
        found = await self._store.results.read_drafts(positions) if positions else {}
        for job_id, drafts in found.items():
            for draft in drafts:
                yield draft
            positions[job_id] = drafts[-1].position

    async def _progress(self, submission: str) -> Progress:
        """Look a submission up; another tenant's does not exist for the caller."""
        progress = await self._store.results.progress(submission)
        if progress is None or progress.tenant != current().tenant:
            raise UnknownSubmissionError(submission)
        return progress

    async def AcknowledgeResults(  # noqa: N802
        self, request: trace_pb2.AcknowledgeResultsRequest, context: Context
    ) -> trace_pb2.AcknowledgeResultsResponse:
        try:
            await self._progress(request.submission_id)
        except UnknownSubmissionError:
            # All of it was acknowledged before: the answer to that was lost.
            return trace_pb2.AcknowledgeResultsResponse()
        await self._store.results.acknowledge(request.submission_id, request.through_entry)
        return trace_pb2.AcknowledgeResultsResponse()

    async def CancelJobs(  # noqa: N802
        self, request: trace_pb2.CancelJobsRequest, context: Context
    ) -> trace_pb2.CancelJobsResponse:
        if bool(request.submission_id) == bool(request.job_ids):
            raise invalid("submission_id", "name either a submission or job_ids, not both or none")
        if request.submission_id:
            progress = await self._progress(request.submission_id)
            ids = job_ids(request.submission_id, progress.jobs)
        else:
            check_job_ids(request.job_ids)
            found = await self._store.queue.jobs(request.job_ids, tenant=current().tenant)
            ids = [job.job_id for job in found if job]
        ended = await end(self._store, self._counts, [cancelled(job_id) for job_id in ids])
        if request.submission_id:
            await self._store.results.expire_soon(request.submission_id)
        return trace_pb2.CancelJobsResponse(cancelled=ended)

    async def GetJobs(  # noqa: N802
        self, request: trace_pb2.GetJobsRequest, context: Context
    ) -> trace_pb2.GetJobsResponse:
        check_job_ids(request.job_ids)
        found = await self._store.queue.jobs(request.job_ids, tenant=current().tenant)
        # A job that is unknown, expired or acknowledged has no state.
        return trace_pb2.GetJobsResponse(
            jobs=[
                trace_pb2.JobStatus(
                    job_id=job.job_id,
                    state=types_pb2.JobState.Value(f"JOB_STATE_{job.state}"),
                    attempt=job.attempt,
                    worker_id=job.worker,
                )
                if job
                else trace_pb2.JobStatus(job_id=job_id)
                for job_id, job in zip(request.job_ids, found, strict=True)
            ]
        )

    async def ListModels(  # noqa: N802
        self, request: trace_pb2.ListModelsRequest, context: Context
    ) -> trace_pb2.ListModelsResponse:
        models = await self._models.get()
        response = trace_pb2.ListModelsResponse()
        for name in models.names:
            for route in models.revisions(name) or [name]:
                response.models.add(model=models.known[route], workers=models.workers.get(route, 0))
        return response


def _check_drafts(request: trace_pb2.StreamResultsRequest) -> None:
    if (count := len(request.drafts_of)) > MAX_DRAFTED_JOBS:
        raise invalid("drafts_of", f"names {count} jobs; at most {MAX_DRAFTED_JOBS} are allowed")
    for index, job_id in enumerate(request.drafts_of):
        if submission_of(job_id) != request.submission_id:
            raise invalid(f"drafts_of[{index}]", f"{job_id!r} is no job of the submission")


async def _messages(
    parts: AsyncIterator[StoredChunk] | AsyncIterator[StoredDraft],
) -> AsyncIterator[trace_pb2.StreamResultsResponse]:
    message, size = trace_pb2.StreamResultsResponse(), 0
    entry, is_whole = 0, True
    async for part in parts:
        if size + len(part.data) > _MESSAGE_BYTES and size:
            yield message
            message, size = trace_pb2.StreamResultsResponse(), 0
        if isinstance(part, StoredChunk):
            if part.entry != entry and not is_whole:
                raise ResultLostError(entry)
            event = message.events.add(entry=part.entry)
            event.chunk.MergeFromString(part.data)
            entry, is_whole = part.entry, event.chunk.HasField("end")
        else:
            message.drafts.add().MergeFromString(part.data)
        size += len(part.data)
    if not is_whole:
        raise ResultLostError(entry)
    if size:
        yield message
