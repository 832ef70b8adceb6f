"""One submission, from the outside: submit, wait, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos import standin
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2


@dataclass(frozen=True, slots=True)
class Submitted:
    """Jobs that were accepted."""

    client: trace_pb2_grpc.TraceServiceStub
    works: list[standin.Work]
    id: str
    job_ids: list[str]

    def jobs(self) -> list[trace_pb2.JobStatus]:
        """Look at the jobs as they are now."""
        request = trace_pb2.GetJobsRequest(job_ids=self.job_ids)
        return list(self.client.GetJobs(request, timeout=10).jobs)

    def states(self) -> list[str]:
        return [
            types_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_") for job in self.jobs()
        ]

    def ends(self, seconds: float = 60.0) -> list[types_pb2.JobEnd]:
        """Read all results; return how each job ended. A success has the right result."""
        stream = self.client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=self.id), timeout=seconds
        )
        chunks: dict[str, list[types_pb2.ResultChunk]] = {job: [] for job in self.job_ids}
        for message in stream:
            for event in message.events:
                chunks[event.chunk.job_id].append(event.chunk)
        ends = []
        for work, job in zip(self.works, self.job_ids, strict=True):
            end = chunks[job][-1].end
            if end.state == types_pb2.JOB_STATE_SUCCEEDED:
                assert list(map(standin.digest, chunks[job])) == standin.expected(work)
            ends.append(end)
        return ends

    def acknowledge(self) -> None:
        """Free the results."""
        self.client.AcknowledgeResults(
            trace_pb2.AcknowledgeResultsRequest(
                submission_id=self.id, through_entry=len(self.works)
            ),
            timeout=10,
        )


def submit(
    client: trace_pb2_grpc.TraceServiceStub, works: Sequence[standin.Work], key: str = ""
) -> Submitted:
    request = trace_pb2.SubmitJobsRequest(jobs=[work.spec for work in works], idempotency_key=key)
    answer = client.SubmitJobs(request, timeout=10)
    return Submitted(client, list(works), answer.submission_id, list(answer.job_ids))
