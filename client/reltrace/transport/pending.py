"""Submissions that are cancelled on the server if their caller stops waiting for results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reltrace_proto.v1 import trace_pb2

from reltrace.transport.retry import TRANSIENT, Deadline
from reltrace.transport.servers import Method, Request, Response, Server
from reltrace.transport.status import RpcStatus
from reltrace.types.errors import TraceError

if TYPE_CHECKING:
    from reltrace.transport.connection import Connection

# Seconds for which cancelling is tried while no server answers.
_CANCEL_TIMEOUT = 60.0
# Seconds that a caller waits for the cancellation, which then goes on in the background.
_ABANDON_WAIT = 1.0
_CLOSE_WAIT = 2.0


@dataclass(eq=False)
class Submission:
    """A submission whose results a caller waits for.

    Attributes
    ----------
    request : SubmitJobsRequest
        Sent again under its key, it returns the id of a submission whose answer was lost.
    sent : bool
        The server may have accepted it.
    id : str
        From the server's answer; "" before.
    job_ids : sequence of str
        Ids of the jobs, from the server's answer.
    results_url : str
        The server's store of large results; "": it has none.
    deduplicated : bool
        The server had it before, under the same key: its results may still exist, or not.
    """

    request: trace_pb2.SubmitJobsRequest
    sent: bool = False
    id: str = ""
    job_ids: Sequence[str] = ()
    results_url: str = ""
    deduplicated: bool = False


class PendingSubmissions:
    """The submissions of a client whose results have not all been read.

    Attributes
    ----------
    record : callable or None
        Called with the number of jobs of each submission that the server may hold for this process,
        whenever it changes: they remain there if the process is killed.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.record: Callable[[Mapping[str, int]], None] | None = None
        self._on_server: dict[str, int] = {}
        self._pending: set[Submission] = set()
        # Tasks that `close` waits for: the server answered when the submission was abandoned.
        self._cancelling: set[asyncio.Task[None]] = set()

    def add(self, submission: Submission) -> None:
        """Add a submission before it is sent."""
        self._pending.add(submission)

    def accepted(self, submission: Submission, answer: trace_pb2.SubmitJobsResponse) -> None:
        submission.id, submission.job_ids = answer.submission_id, list(answer.job_ids)
        submission.deduplicated, submission.results_url = answer.deduplicated, answer.results_url
        self._add_on_server({submission.id: len(submission.request.jobs)})

    def finished(self, submission: Submission) -> None:
        """Remove a submission of which nothing is left on the server."""
        self._pending.discard(submission)
        self._remove_from_server(submission.id)

    async def cancel_recorded(self, recorded: Mapping[str, int]) -> None:
        """Cancel the submissions of a process that was killed, which its `record` received."""
        self._add_on_server(recorded)
        await asyncio.gather(*(self._cancel_and_free(*item) for item in recorded.items()))

    async def abandon(self, submission: Submission, *, unreachable: bool) -> None:
        """Cancel a submission on the server, and wait a little for that.

        If the server is unreachable, it is cancelled in the background. A submission may be
        abandoned twice.
        """
        task = self._start_cancelling(submission, unreachable=unreachable)
        if task is not None and not unreachable:
            await asyncio.wait({task}, timeout=_ABANDON_WAIT)

    async def close(self) -> None:
        """Abandon every submission."""
        for submission in tuple(self._pending):
            self._start_cancelling(submission, unreachable=False)
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=_CLOSE_WAIT)

    def _add_on_server(self, jobs: Mapping[str, int]) -> None:
        self._on_server |= jobs
        if self.record is not None:
            self.record(self._on_server)

    def _remove_from_server(self, submission_id: str) -> None:
        if self._on_server.pop(submission_id, None) is not None and self.record is not None:
            self.record(self._on_server)

    def _start_cancelling(
        self, submission: Submission, *, unreachable: bool
    ) -> asyncio.Task[None] | None:
        if submission not in self._pending:
            return None
        self._pending.discard(submission)
        if not submission.sent:
            return None
        task = self._connection.run_in_background(self._cancel(submission))
        if not unreachable:
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)
        return task

    async def _cancel(self, submission: Submission) -> None:
        try:
            async with asyncio.timeout(_CANCEL_TIMEOUT):
                if not submission.id:
                    # Submitted again under its key, which adds no job, for the id in the answer.
                    answer = await self._call(
                        lambda server: server.traces.SubmitJobs, submission.request
                    )
                    submission.id = "" if isinstance(answer, RpcStatus) else answer.submission_id
        except (TraceError, TimeoutError):
            return
        if submission.id:
            await self._cancel_and_free(submission.id, len(submission.request.jobs))

    async def _cancel_and_free(self, submission_id: str, jobs: int) -> None:
        cancel = trace_pb2.CancelJobsRequest(submission_id=submission_id)
        # Once cancelled, all of its jobs have ended, each with one entry of results.
        free = trace_pb2.AcknowledgeResultsRequest(submission_id=submission_id, through_entry=jobs)
        try:
            async with asyncio.timeout(_CANCEL_TIMEOUT):
                await self._call(lambda server: server.traces.CancelJobs, cancel)
                await self._call(lambda server: server.traces.AcknowledgeResults, free)
        except (TraceError, TimeoutError):
            # The caller gets the error for which it stopped waiting, not this one.
            return
        self._remove_from_server(submission_id)

    async def _call(
        self, method: Callable[[Server], Method[Request, Response]], request: Request
    ) -> Response | RpcStatus:
        return await self._connection.try_call(
            method,
            request,
            Deadline(None),
            is_answer=lambda status: status.code not in TRANSIENT,
            while_closing=True,
        )
