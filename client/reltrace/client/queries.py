"""What clients ask a server besides traces: models, state, jobs; and cancelling jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.message import Message
from reltrace_proto.v1 import admin_pb2, trace_pb2

from reltrace.client.admin import Admin, AsyncAdmin
from reltrace.client.loop_thread import LoopThread
from reltrace.transport.connection import Connection, Deadline
from reltrace.types import server_info as info
from reltrace.types.errors import RpcStatus, invalid

_TIMEOUT = 60.0
# Of the ids in one request.
_AT_ONCE = 1000

# The ids of a submission and of its jobs.
_SUBMISSION = re.compile(r"[^\s-]+")
_JOB = re.compile(r"[^\s-]+-\d+")
_EITHER = re.compile(r"[^\s-]+(-\d+)?")


class AsyncQueries:
    """The queries of `AsyncClient`; see `Queries`."""

    _connection: Connection

    @property
    def admin(self) -> AsyncAdmin:
        """The operator's calls; see `Client.admin`."""
        return AsyncAdmin(self._connection)

    async def models(self) -> list[info.Model]:
        """Return the models that can be traced. See `Client.models`."""
        answer = await self._query(
            lambda server: server.traces.ListModels, trace_pb2.ListModelsRequest()
        )
        return info.models(answer)

    async def status(self) -> info.Status:
        """Return the state of the server. See `Client.status`."""
        answer = await self._query(
            lambda server: server.admin.GetStatus, admin_pb2.GetStatusRequest()
        )
        return info.status(answer)

    async def jobs(self, *job_ids: str) -> list[info.JobStatus]:
        """Return the state of jobs. See `Client.jobs`."""
        _check_ids(job_ids, _JOB, "a job id")
        found: list[info.JobStatus] = []
        for some in _portions(job_ids):
            answer = await self._query(
                lambda server: server.traces.GetJobs, trace_pb2.GetJobsRequest(job_ids=some)
            )
            found += info.jobs(answer)
        return found

    async def cancel(self, *ids: str) -> int:
        """Cancel jobs, or all jobs of submissions. See `Client.cancel`."""
        _check_ids(
            ids, re.compile(f"{_SUBMISSION.pattern}|{_JOB.pattern}"), "a job's or submission's id"
        )
        requests = [
            trace_pb2.CancelJobsRequest(submission_id=one)
            for one in ids
            if _SUBMISSION.fullmatch(one)
        ]
        requests += (
            trace_pb2.CancelJobsRequest(job_ids=some)
            for some in _portions([one for one in ids if _JOB.fullmatch(one)])
        )
        cancelled = 0
        for request in requests:
            answer = await self._query(lambda server: server.traces.CancelJobs, request)
            cancelled += answer.cancelled
        return cancelled

    async def _query(self, method: Any, request: Message) -> Any:
        answer = await self._connection.call(method, request, Deadline(_TIMEOUT))
        assert not isinstance(answer, RpcStatus)
        return answer


class Queries:
    """The queries of `Client`."""

    _client: AsyncQueries
    _loop: LoopThread

    @property
    def admin(self) -> Admin:
        """The operator's calls: quarantined jobs, tenants."""
        return Admin(self._client.admin, self._loop)

    def models(self) -> list[info.Model]:
        """Return the models that can be traced, with the workers that serve them.

        Raises
        ------
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        """
        return self._loop.run(self._client.models())

    def status(self) -> info.Status:
        """Return the state of the server: queues, workers, ended jobs, store.

        Raises
        ------
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        """
        return self._loop.run(self._client.status())

    def jobs(self, *job_ids: str) -> list[info.JobStatus]:
        """Return the state of jobs, in the order of their ids.

        Parameters
        ----------
        *job_ids : str
            Ids, such as `Trace.job_id` and `TraceError.job_id`.

        Raises
        ------
        InvalidArgument
            If one of them is no job id.
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        """
        return self._loop.run(self._client.jobs(*job_ids))

    def cancel(self, *ids: str) -> int:
        """Cancel jobs: one that waits never runs, one that runs is dropped before its next pass.

        Whoever reads their results gets `Cancelled`. Jobs that have ended stay as they are.

        Parameters
        ----------
        *ids : str
            Ids of jobs ("1f2e-0"), or of submissions ("1f2e") for all of their jobs.

        Returns
        -------
        int
            How many jobs this call ended.

        Raises
        ------
        InvalidArgument
            If one of them is no such id.
        NotFound
            If the server does not know a submission.
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        """
        return self._loop.run(self._client.cancel(*ids))


def _check_ids(ids: Sequence[str], pattern: re.Pattern[str], what: str) -> None:
    for index, one in enumerate(ids):
        if not isinstance(one, str) or not pattern.fullmatch(one):
            raise invalid(f"ids[{index}]", f"must be {what}, not {one!r}")


def _portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _AT_ONCE):
        yield ids[start : start + _AT_ONCE]
