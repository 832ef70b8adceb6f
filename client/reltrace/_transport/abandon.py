"""What a caller gives up is ended on the server: nobody would read it, and others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from reltrace_proto.v1 import trace_pb2

from reltrace._errors import RpcStatus, TraceError
from reltrace._transport.connection import Connection, Deadline

# Nobody who gives up is kept waiting for longer; the call itself goes on, so long as the client
# lives.
_WAIT = 1.0
_TIMEOUT = 10.0


async def abandon_submission(connection: Connection, submission_id: str) -> None:
    """Cancel the jobs of a submission that have not ended."""
    await _in_background(connection, _cancel(connection, submission_id))


async def abandon_all(connection: Connection) -> None:
    """Cancel the jobs of every submission that is being read: the connection is about to close."""
    connection.closing = True
    for submission_id in connection.reading:
        connection.keep(asyncio.create_task(_cancel(connection, submission_id)))
    await connection.finish(_WAIT)


async def abandon_request(connection: Connection, request: trace_pb2.SubmitJobsRequest) -> None:
    """Cancel what a request may have handed in, although its answer never came.

    The same request again, which its idempotency key makes harmless, tells under which id.
    """
    await _in_background(connection, _submit_and_cancel(connection, request))


async def cancel_submission(connection: Connection, submission_id: str, deadline: Deadline) -> int:
    """Cancel the jobs of a submission that have not ended; return how many that were.

    Raises
    ------
    TraceError
        If the server does not know the submission, or can not be reached.
    """
    answer = await connection.call(
        lambda server: server.traces.CancelJobs,
        trace_pb2.CancelJobsRequest(submission_id=submission_id),
        deadline,
    )
    assert not isinstance(answer, RpcStatus)
    return answer.cancelled


async def _in_background(connection: Connection, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    connection.keep(task)
    await asyncio.wait({task}, timeout=_WAIT)


async def _cancel(connection: Connection, submission_id: str) -> None:
    try:
        await cancel_submission(connection, submission_id, Deadline(_TIMEOUT))
    except TraceError:
        # The caller is told of its own error; what can not be cancelled runs, and expires unread.
        return


async def _submit_and_cancel(connection: Connection, request: trace_pb2.SubmitJobsRequest) -> None:
    try:
        answer = await connection.call(
            lambda server: server.traces.SubmitJobs, request, Deadline(_TIMEOUT)
        )
    except TraceError:
        return
    assert not isinstance(answer, RpcStatus)
    await _cancel(connection, answer.submission_id)
