"""A client of the fleet: submits many jobs by the bare stubs, and looks that each is answered once.

It begins with a line on its standard input, and tells what it has come to as JSON lines: `ready`,
`warm` (a fifth is answered), `submitted` (all are accepted), and last `done` with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import uvloop
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
]
_WARM = 0.2
PRIORITIES = {
    "interactive": types_pb2.PRIORITY_INTERACTIVE,
    "batch": types_pb2.PRIORITY_BATCH,
}


@dataclass
class Tally:
    """What became of the jobs."""

    jobs: int
    open: int = 0
    """Jobs that were sent and not answered."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    doubled: int = 0
    failed: int = 0
    result_bytes: int = 0

    def accept(self, job_ids: list[str]) -> None:
        before = len(self.accepted)
        self.accepted.update(job_ids)
        if len(self.accepted) != before + len(job_ids):
            raise RuntimeError("a job id was given twice")
        if len(self.accepted) == self.jobs:
            tell("submitted")

    def answer(self, chunk: types_pb2.ResultChunk) -> None:
        if chunk.job_id in self.answered or chunk.job_id not in self.accepted:
            self.doubled += 1
            return
        self.answered.add(chunk.job_id)
        self.open -= 1
        self.moved.set()
        self.failed += chunk.end.state != types_pb2.JOB_STATE_SUCCEEDED
        self.result_bytes += chunk.ByteSize()
        if len(self.answered) == int(_WARM * self.jobs):
            tell("warm")

    def figures(self) -> dict[str, int]:
        return {
            "accepted": len(self.accepted),
            "answered": len(self.answered),
            "lost": self.jobs - len(self.answered),
            "doubled": self.doubled,
            "failed": self.failed,
            "result_bytes": self.result_bytes,
        }


def tell(event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


async def one(
    stub: trace_pb2_grpc.TraceServiceAsyncStub,
    specs: list[types_pb2.JobSpec],
    priority: types_pb2.Priority.ValueType,
    tally: Tally,
    timeout: float,
) -> None:
    """Bring one submission to its results and acknowledge them."""
    request = trace_pb2.SubmitJobsRequest(
        idempotency_key=str(uuid.uuid4()), jobs=specs, priority=priority
    )
    submitted = await stub.SubmitJobs(request, timeout=timeout)
    tally.accept(list(submitted.job_ids))
    entry = 0
    async for response in stub.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=submitted.submission_id),
        timeout=timeout,
    ):
        for event in response.events:
            # Results here are one chunk each: every event ends a job.
            tally.answer(event.chunk)
            entry = event.entry
    await stub.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(
            submission_id=submitted.submission_id, through_entry=entry
        ),
        timeout=timeout,
    )


async def all_jobs(given: argparse.Namespace) -> Tally:
    """Keep `in_flight` jobs open until all were answered."""
    spec = types_pb2.JobSpec(model=given.model, sites=["resid"], reduction="token", rule="attnlrp")
    spec.input_ids.ids.extend([1, 2, 3, 4])
    spec.targets.add()
    tally = Tally(given.jobs)
    end = time.monotonic() + given.timeout
    async with (
        grpc.aio.insecure_channel(given.scheduler, options=_OPTIONS) as channel,
        asyncio.TaskGroup() as group,
    ):
        stub = trace_pb2_grpc.TraceServiceStub(channel)
        for start in range(0, given.jobs, given.batch):
            count = min(given.batch, given.jobs - start)
            # By jobs, not by submissions: one that waits for its last job holds no other back.
            while tally.open and tally.open + count > given.in_flight:
                tally.moved.clear()
                await tally.moved.wait()
            tally.open += count
            left = end - time.monotonic()
            group.create_task(one(stub, [spec] * count, PRIORITIES[given.priority], tally, left))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheduler", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--in-flight", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256, help="jobs in one submission")
    parser.add_argument("--priority", choices=PRIORITIES, default="interactive")
    parser.add_argument("--timeout", type=float, default=300.0)
    given = parser.parse_args()
    tell("ready")
    sys.stdin.readline()
    before = time.process_time()
    tally = uvloop.run(all_jobs(given))
    tell("done", **tally.figures(), cpu_seconds=time.process_time() - before)


if __name__ == "__main__":
    main()
