"""What a caller leaves behind: jobs that nobody waits for any more are cancelled on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reltrace_proto.v1 import trace_pb2

from reltrace.types.errors import RpcStatus, TraceError

if TYPE_CHECKING:
    from reltrace.transport.connection import Connection

# The calls that cancel go on for this long if the server is away.
_PATIENCE = 60.0
# Whoever leaves is kept for as long as this; what is not done by then goes on by itself.
_WAIT = 1.0
_CLOSE_WAIT = 2.0


class Open:
    """A submission whose results somebody waits for.

    Attributes
    ----------
    request : SubmitJobsRequest
        Repeated under its key, it tells the id of a submission whose answer was not seen.
    id : str
        As the server answered; "" before.
    sent : bool
        The server may have accepted it.
    """

    def __init__(self, request: trace_pb2.SubmitJobsRequest) -> None:
        self.request = request
        self.id = ""
        self.sent = False


class Leftovers:
    """The open submissions of a connection.

    Parameters
    ----------
    connection : Connection
        To the servers.

    Attributes
    ----------
    record : callable or None
        Takes, whenever it changes, how many jobs each submission has that the server may hold for
        this process: what is left on it if the process is killed.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.record: Callable[[Mapping[str, int]], None] | None = None
        self._held: dict[str, int] = {}
        self._open: set[Open] = set()
        # Those whose server answered when they were left: worth a wait.
        self._cancelling: set[asyncio.Task[None]] = set()

    def open(self, request: trace_pb2.SubmitJobsRequest) -> Open:
        """Note a submission before it is sent."""
        submission = Open(request)
        self._open.add(submission)
        return submission

    def accepted(self, submission: Open, name: str) -> None:
        """Note the id that the server gave to a submission."""
        submission.id = name
        self._hold({name: len(submission.request.jobs)})

    def done(self, submission: Open) -> None:
        """Note that nothing of a submission is left on the server."""
        self._open.discard(submission)
        self._freed(submission.id)

    async def take_over(self, held: Mapping[str, int]) -> None:
        """Cancel what a process that was killed left on the server.

        Parameters
        ----------
        held : mapping of str to int
            What its `record` was given last.
        """
        self._hold(held)
        await asyncio.gather(*(self._free(name, jobs) for name, jobs in held.items()))

    def _hold(self, held: Mapping[str, int]) -> None:
        self._held |= held
        if self.record is not None:
            self.record(self._held)

    def _freed(self, name: str) -> None:
        if self._held.pop(name, None) is not None and self.record is not None:
            self.record(self._held)

    async def leave(self, submission: Open, *, away: bool) -> None:
        """Cancel a submission on the server, and wait a little until that is done.

        Parameters
        ----------
        submission : Open
            Left for good. Twice is as good as once.
        away : bool
            The server does not answer at present: cancelled in the background.
        """
        task = self._start(submission, away=away)
        if task is not None and not away:
            await asyncio.wait({task}, timeout=_WAIT)

    async def close(self) -> None:
        """Leave all that is open."""
        for submission in tuple(self._open):
            self._start(submission, away=False)
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=_CLOSE_WAIT)

    def _start(self, submission: Open, *, away: bool) -> asyncio.Task[None] | None:
        if submission not in self._open:
            return None
        self._open.discard(submission)
        if not submission.sent:
            return None
        task = asyncio.create_task(self._cancel(submission))
        self._connection.keep(task)
        if not away:
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)
        return task

    async def _cancel(self, submission: Open) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                name = submission.id or await self._ask_for_id(submission)
        except (TraceError, TimeoutError):
            return
        if name:
            await self._free(name, len(submission.request.jobs))

    async def _free(self, name: str, jobs: int) -> None:
        """Cancel the jobs of a submission and free its results."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._connection.call_last(
                    lambda server: server.traces.CancelJobs,
                    trace_pb2.CancelJobsRequest(submission_id=name),
                )
                # All of its jobs have ended, and nobody reads how.
                await self._connection.call_last(
                    lambda server: server.traces.AcknowledgeResults,
                    trace_pb2.AcknowledgeResultsRequest(submission_id=name, through_entry=jobs),
                )
        except (TraceError, TimeoutError):
            # The caller has left for a reason of its own, which this must not hide.
            return
        self._freed(name)

    async def _ask_for_id(self, submission: Open) -> str:
        """Hand the jobs in once more, which adds nothing where they have been accepted."""
        answer = await self._connection.call_last(
            lambda server: server.traces.SubmitJobs, submission.request
        )
        return "" if isinstance(answer, RpcStatus) else answer.submission_id
