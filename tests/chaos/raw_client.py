"""A client that speaks gRPC itself, notes every chunk it sees, and may be killed.

    python -m chaos.raw_client --server ADDRESS --journal FILE --seed N --first N --until FILE

Submits, reads, reads again, acknowledges, until there is a file of the name given. What it
does follows from the seed alone, and where it is stands in its journal: started again, it goes on
there. Lines of the journal, in this order for each submission `n`:

    {"n", "works"}                      before it is submitted
    {"n", "submission", "ids"}          accepted
    {"n", "entry", "job", "number", "state", "attempt", "error", "digest", "bytes"}
                                        a chunk, seen
    {"n", "again"}                      read once more from the start: chunks that differed
    {"n", "forgotten"}                  the service knows less of it than it had said, because its
                                        Redis lost what it had written last: all is read again, and
                                        before that, if `forgotten` is true, submitted again
    {"n", "done"}                       acknowledged
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
from chaos import standin
from chaos.channels import connect
from chaos.journal import Journal
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds without an answer after which the client gives up, with an error."""

_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # Redis is full: it says when to try again, which is not tested here.
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class ForgottenError(Exception):
    """The service knows less of a submission than it had said.

    Parameters
    ----------
    wholly
        It does not know that it accepted it.
    """

    def __init__(self, wholly: bool) -> None:
        super().__init__()
        self.wholly = wholly


@dataclass
class Open:
    """The submission that is under way."""

    number: int
    works: list[standin.Work]
    submission: str = ""
    ids: list[str] = field(default_factory=list)
    last_entry: int = 0
    chunks: int = 0
    seen: list[tuple[int, int, str]] = field(default_factory=list)
    """Entry, chunk number and digest of every byte, in order."""
    reread: bool = False
    jobs_ended: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.jobs_ended) == len(self.works)

    def saw(self, entry: int, number: int, whole: str, job: int, *, end: bool) -> None:
        self.seen.append((entry, number, whole))
        self.chunks = 0 if end else number
        if end:
            self.jobs_ended.add(job)
            self.last_entry = entry

    def forget(self, wholly: bool) -> None:
        """Begin anew: to read, or even to submit."""
        self.last_entry = self.chunks = 0
        self.reread = False
        self.seen.clear()
        self.jobs_ended.clear()
        if wholly:
            self.submission, self.ids = "", []


class RawClient:
    """Submits one batch after another.

    Parameters
    ----------
    server
        Addresses, with commas between: the next one where one is away.
    token
        Empty: none is asked for.
    journal
        Where it is.
    seed
        What it does.
    first
        Number of its first job.
    most_jobs
        In one submission.
    """

    def __init__(
        self, server: str, token: str, journal: Journal, seed: int, first: int, most_jobs: int
    ) -> None:
        self._client = trace_pb2_grpc.TraceServiceStub(
            connect(
                server,
                token,
                [
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.max_reconnect_backoff_ms", 500),
                    ("grpc.max_receive_message_length", 64 << 20),
                    ("grpc.keepalive_time_ms", 5_000),
                    ("grpc.keepalive_timeout_ms", 2_000),
                ],
            )
        )
        self._journal = journal
        self._seed = seed
        self._first = first
        self._most_jobs = most_jobs

    def run(self, until: Path) -> None:
        current = self._resumed()
        while True:
            self._finish(current)
            if until.exists():
                return
            current = self._new(current.number + 1)

    def _resumed(self) -> Open:
        current: Open | None = None
        for line in self._journal.lines():
            if "works" in line:
                current = Open(line["n"], [standin.Work(*work) for work in line["works"]])
            assert current is not None
            if "submission" in line:
                current.submission, current.ids = line["submission"], line["ids"]
            elif "entry" in line:
                current.saw(
                    line["entry"], line["number"], line["bytes"], line["job"],
                    end=line["state"] is not None,
                )  # fmt: skip
            elif "again" in line:
                current.reread = True
            elif "forgotten" in line:
                current.forget(line["forgotten"])
            elif "done" in line:
                current = Open(line["n"], [])
        if current is None or not current.works:
            return self._new(current.number + 1 if current else 0)
        # It may have been acknowledged, and then there is nothing to read again.
        current.reread |= current.complete
        return current

    def _source(self, number: int) -> random.Random:
        return random.Random(self._seed * 1_000_003 + number)

    def _new(self, number: int) -> Open:
        source = self._source(number)
        first = self._first + number * 1000
        works = standin.drawn(range(first, first + source.randint(1, self._most_jobs)), source)
        self._journal.write(n=number, works=[work.ids[:3] for work in works])
        return Open(number, works)

    def _finish(self, current: Open) -> None:
        source = self._source(current.number)
        while True:
            try:
                self._go_on(current, source)
                return
            except ForgottenError as error:
                self._journal.write(n=current.number, forgotten=error.wholly)
                current.forget(error.wholly)

    def _go_on(self, current: Open, source: random.Random) -> None:
        if not current.submission:
            self._submit(current)
            if source.random() < 0.3:
                # As if the answer had been lost: the same key, the same jobs.
                first = current.submission, current.ids
                self._submit(current)
                if (current.submission, current.ids) != first:
                    self._journal.write(n=current.number, forgotten=True)
            self._journal.write(n=current.number, submission=current.submission, ids=current.ids)
        while not current.complete:
            # Some streams are left in the middle, by seed.
            leave_after = source.randint(1, 200) if source.random() < 0.3 else None
            self._patiently(partial(self._read, current, leave_after))
        if not current.reread and source.random() < 0.3:
            self._read_again(current)
        acknowledge = trace_pb2.AcknowledgeResultsRequest(
            submission_id=current.submission, through_entry=current.last_entry
        )
        self._patiently(lambda: self._client.AcknowledgeResults(acknowledge, timeout=5))
        self._journal.write(n=current.number, done=True)

    def _submit(self, current: Open) -> None:
        request = trace_pb2.SubmitJobsRequest(
            idempotency_key=f"chaos-{self._first}-{current.number}",
            jobs=[work.spec for work in current.works],
        )
        answer = self._patiently(lambda: self._client.SubmitJobs(request, timeout=5))
        current.submission, current.ids = answer.submission_id, list(answer.job_ids)

    def _read(self, current: Open, leave_after: int | None) -> None:
        jobs = {job: index for index, job in enumerate(current.ids)}
        stream = self._stream(current.submission, current.last_entry, current.chunks)
        for count, event in enumerate(stream, 1):
            chunk = event.chunk
            end = chunk.HasField("end")
            whole = _whole(chunk)
            job = jobs[chunk.job_id]
            if job in current.jobs_ended:
                # The entry that it had is no more: there is another of that number.
                raise ForgottenError(wholly=False)
            current.saw(event.entry, chunk.number, whole, job, end=end)
            self._journal.write(
                n=current.number,
                entry=event.entry,
                job=job,
                number=chunk.number,
                state=types_pb2.JobState.Name(chunk.end.state) if end else None,
                attempt=chunk.end.attempt if end else None,
                error=chunk.end.error.message,
                digest=standin.digest(chunk),
                bytes=whole,
            )
            if count == leave_after:
                stream.close()
                return

    def _stream(
        self, submission: str, after_entry: int, after_chunk: int
    ) -> Iterator[trace_pb2.ResultEvent]:
        call = self._client.StreamResults(
            trace_pb2.StreamResultsRequest(
                submission_id=submission, after_entry=after_entry, after_chunk=after_chunk
            ),
            timeout=PATIENCE,
        )
        try:
            for message in call:
                yield from message.events
        finally:
            call.cancel()

    def _read_again(self, current: Open) -> None:
        """Read from the start what is there: the same bytes in the same order."""

        def read() -> list[tuple[int, int, str]]:
            events = self._stream(current.submission, 0, 0)
            return [(event.entry, event.chunk.number, _whole(event.chunk)) for event in events]

        again = self._patiently(read)
        differ = sum(a != b for a, b in zip(again, current.seen, strict=False))
        differ += abs(len(again) - len(current.seen))
        self._journal.write(n=current.number, again=differ)

    def _patiently(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise ForgottenError(wholly=True) from None
                if error.code() not in _AWAY or time.monotonic() > deadline:
                    raise
            # Between one try and the next, so as not to hammer a server that is away.
            time.sleep(0.05)


def _whole(chunk: types_pb2.ResultChunk) -> str:
    return hashlib.sha256(chunk.SerializeToString(deterministic=True)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first job")
    parser.add_argument("--until", type=Path, required=True)
    parser.add_argument("--most-jobs", type=int, default=60)
    given = parser.parse_args()
    journal = Journal(given.journal)
    RawClient(given.server, given.token, journal, given.seed, given.first, given.most_jobs).run(
        given.until
    )


if __name__ == "__main__":
    main()
