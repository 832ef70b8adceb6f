"""Recovers the results of jobs that a server had accepted, and lost.

A server's store may be replaced by a replica that lacks its last writes. Then a submission may be
unknown, or it may be known as it was some time ago: jobs whose results were received run again, and
the numbers of entries are given to results of other jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reltrace.transport.assemble import JobResult, ResultCursor
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import is_key_taken, new_key, resubmit
from reltrace.types.errors import InvalidArgument, NotFound, TraceError
from reltrace.types.request import Job

log = logging.getLogger("reltrace")

# So many losses without a result in between are the server's fault.
_MAX_LOSSES = 3


class Recovery:
    """Has the results come again that the reader of a submission lacks."""

    def __init__(
        self,
        connection: Connection,
        submission: Submission,
        cursor: ResultCursor,
        jobs: Sequence[Job],
        deadline: Deadline,
    ) -> None:
        self._connection = connection
        self._submission = submission
        self._cursor = cursor
        self._jobs = jobs
        self._deadline = deadline
        self._losses = 0
        self._rewound = False

    def received(self) -> None:
        """Note that a result was received."""
        self._losses, self._rewound = 0, False

    async def after(self, fault: TraceError) -> list[JobResult]:
        """Prepare for reading on after a fault; return the failures of jobs that were rejected.

        Raises
        ------
        TraceError
            The fault, if it is of another kind.
        """
        if not isinstance(fault, NotFound) and not self._rewound:
            # What is missing may be in entries before the present one.
            self._rewound = True
            self._cursor.rewind()
            return []
        self._losses += 1
        if self._losses > _MAX_LOSSES:
            if isinstance(fault, NotFound):
                self._connection.pending.finished(self._submission)
            raise fault
        # One that is known keeps its key, and what is missing of it becomes another one.
        key = self._submission.request.idempotency_key
        return await self._submit(key if isinstance(fault, NotFound) else new_key(), fault)

    async def _submit(self, key: str, fault: TraceError) -> list[JobResult]:
        before, deduplicated = self._submission.id, self._submission.deduplicated
        ids = list(self._submission.job_ids)
        failures: list[JobResult] = []
        what = "the server has lost %d accepted jobs"
        while missing := self._cursor.missing:
            jobs = [self._jobs[index] for index in missing]
            expired = False
            try:
                rejected = await resubmit(
                    self._connection, self._submission, jobs, self._deadline, key
                )
            except InvalidArgument as refusal:
                if not is_key_taken(refusal):
                    raise
                expired, rejected = True, None
            if expired or (rejected is None and self._submission.id == before):
                # The submission is unknown, though its key is known: its results were kept for as
                # long as the server keeps them, such as while this machine slept.
                self._connection.pending.finished(self._submission)
                if deduplicated:
                    self._submission.deduplicated = True
                    raise fault
                key, what = new_key(), "the results of %d jobs have expired before they were read"
                continue
            if rejected is None:
                break
            for position, error in rejected.errors.items():
                self._cursor.drop(missing[position])
                failures.append(JobResult(missing[position], error, 0))
        if missing:
            log.warning(f"{what}; submitted them again", len(missing))
            again = dict(zip(self._submission.job_ids, missing, strict=True))
            self._cursor.restart(again)
            for job_id, index in again.items():
                ids[index] = job_id
            self._submission.job_ids = ids
        # All entries of it are read from the start.
        self._rewound = True
        return failures
