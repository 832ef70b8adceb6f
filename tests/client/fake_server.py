"""A server that speaks the protocol over a real socket, and misbehaves as told.

It stands where the scheduler and its workers stand. What comes back is in `fake_results`.
"""

# ruff: noqa: N802 - the names of the service's methods
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from fake_results import HIDDEN, LAYERS, chunks_of, failed_chunk
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, trace_pb2, trace_pb2_grpc, types_pb2


def status_with(code: grpc.StatusCode, message: str, *details: Any) -> status_pb2.Status:
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def queue_full(seconds: float) -> status_pb2.Status:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return status_with(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        error_details_pb2.RetryInfo(retry_delay=delay),
    )


@dataclass
class Submission:
    id: str
    key: str
    job_ids: list[str]
    specs: list[types_pb2.JobSpec]


@dataclass
class FakeServer(trace_pb2_grpc.TraceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """See the module.

    Attributes
    ----------
    submit_errors, stream_errors
        Statuses that the next calls are answered with, one each.
    acknowledge_errors
        So many acknowledgements are refused first.
    faults
        From a job to its violations: such a job rejects its submission.
    rejection
        The code of such a rejection.
    max_jobs
        No submission of more jobs fits.
    before_answer
        Called when a submission is stored, before it is answered.
    lose_answer
        The next submission is stored, but its answer is lost.
    drop_at
        The stream breaks off before the n-th event that is sent in all, for every n in it.
    at_drop
        Called whenever that happens.
    run
        From (spec, job id) to the chunks of the result.
    drafts
        From a job's id to what is drafted of it before it ends, for those who ask for it.
    reverse
        Jobs end in the reverse order.
    hold
        Jobs wait for this before they end; one that is cancelled meanwhile ends CANCELLED.
    credentials
        Serve TLS with these.
    token
        Callers must present it.
    before
        Called with the name of each method, before its token is looked at.
    unserved
        Models that have no worker at present, as answers to submissions say.
    results_url
        The store of large results, as answers to submissions say.
    presented
        What the calls presented, in order.
    cancelled
        The jobs that were cancelled before they ended.
    ended
        The states of the jobs that have ended.
    served
        Name, revision and workers of the models that are listed.
    """

    piece_bytes: int = 1 << 20
    submit_errors: deque[status_pb2.Status] = field(default_factory=deque)
    stream_errors: deque[status_pb2.Status] = field(default_factory=deque)
    acknowledge_errors: int = 0
    faults: Callable[[types_pb2.JobSpec], list[tuple[str, str]]] = lambda spec: []
    rejection: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    max_jobs: int = 1000
    before_answer: Callable[[], None] = lambda: None
    lose_answer: bool = False
    drop_at: set[int] = field(default_factory=set)
    at_drop: Callable[[], None] = lambda: None
    run: Callable[[types_pb2.JobSpec, str], list[types_pb2.ResultChunk]] | None = None
    drafts: Callable[[str], Iterable[types_pb2.Draft]] = lambda job_id: ()
    reverse: bool = False
    hold: Callable[[types_pb2.JobSpec], None] = lambda spec: None
    truncate: bool = False
    credentials: grpc.ServerCredentials | None = None
    token: str | None = None
    before: Callable[[str], None] = lambda method: None
    served: list[tuple[str, str, int]] = field(default_factory=lambda: [("fake", "r1", 2)])

    unserved: set[str] = field(default_factory=set)
    results_url: str = ""

    presented: list[str] = field(default_factory=list)
    requests: list[trace_pb2.SubmitJobsRequest] = field(default_factory=list)
    streams: list[trace_pb2.StreamResultsRequest] = field(default_factory=list)
    submissions: dict[str, Submission] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    ended: dict[str, types_pb2.JobState.ValueType] = field(default_factory=dict)
    sent: int = 0
    _forgotten: int = 0
    address: str = ""

    def __enter__(self) -> Self:
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; after `stop`, at the same address and with all that was submitted."""
        self._server = grpc.server(futures.ThreadPoolExecutor(32), interceptors=[_Guard(self)])
        trace_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        address = self.address or "127.0.0.1:0"
        port = (
            self._server.add_secure_port(address, self.credentials)
            if self.credentials
            else self._server.add_insecure_port(address)
        )
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Break off all calls."""
        self._server.stop(grace=0).wait(5)

    def forget(self) -> None:
        """Lose all that was accepted."""
        with self._lock:
            self._forgotten += len(self.submissions)
            self.submissions.clear()

    def jobs_submitted(self) -> int:
        with self._lock:
            return sum(len(submission.specs) for submission in self.submissions.values())

    def wait_for(self, condition: Callable[[], bool], timeout: float = 5) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout)

    def wait_acknowledged(self, timeout: float = 5) -> None:
        """Wait until every submission is acknowledged to its end."""
        with self.changed:
            done = self.changed.wait_for(
                lambda: all(
                    self.acknowledged.get(s.id) == len(s.specs) for s in self.submissions.values()
                ),
                timeout,
            )
        assert done, f"acknowledged: {self.acknowledged}"

    def SubmitJobs(
        self, request: trace_pb2.SubmitJobsRequest, context: Any
    ) -> trace_pb2.SubmitJobsResponse:
        with self._lock:
            self.requests.append(request)
            if self.submit_errors:
                context.abort_with_status(rpc_status.to_status(self.submit_errors.popleft()))
            violations = [
                error_details_pb2.BadRequest.FieldViolation(
                    field=f"jobs[{index}].{name}", description=description
                )
                for index, spec in enumerate(request.jobs)
                for name, description in self.faults(spec)
            ]
            if len(request.jobs) > self.max_jobs:
                violations = [
                    error_details_pb2.BadRequest.FieldViolation(
                        field="jobs", description=f"at most {self.max_jobs} fit"
                    )
                ]
            if violations:
                bad = error_details_pb2.BadRequest(field_violations=violations)
                context.abort_with_status(
                    rpc_status.to_status(status_with(self.rejection, "rejected", bad))
                )
            known = {s.key: s for s in self.submissions.values()}
            submission = known.get(request.idempotency_key)
            before = submission is not None
            if submission is not None and submission.specs != list(request.jobs):
                bad = error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field="idempotency_key", description="was used for other jobs"
                        )
                    ]
                )
                context.abort_with_status(
                    rpc_status.to_status(
                        status_with(grpc.StatusCode.INVALID_ARGUMENT, "rejected", bad)
                    )
                )
            if submission is None:
                number = len(self.submissions) + self._forgotten
                submission = Submission(
                    id=f"s{number}",
                    key=request.idempotency_key,
                    job_ids=[f"s{number}-{i}" for i in range(len(request.jobs))],
                    specs=list(request.jobs),
                )
                self.submissions[submission.id] = submission
                self.changed.notify_all()
            if self.lose_answer:
                self.lose_answer = False
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        self.before_answer()
        return trace_pb2.SubmitJobsResponse(
            submission_id=submission.id,
            job_ids=submission.job_ids,
            deduplicated=before,
            results_url=self.results_url,
            unserved={spec.model for spec in request.jobs} & self.unserved,
        )

    def StreamResults(
        self, request: trace_pb2.StreamResultsRequest, context: Any
    ) -> Iterator[trace_pb2.StreamResultsResponse]:
        with self._lock:
            self.streams.append(request)
            if self.stream_errors:
                context.abort_with_status(rpc_status.to_status(self.stream_errors.popleft()))
            submission = self.submissions.get(request.submission_id)
            freed = self.acknowledged.get(request.submission_id, 0)
            if submission is None or freed >= len(submission.specs):
                context.abort(grpc.StatusCode.NOT_FOUND, "the submission is not known here")
        jobs = list(zip(submission.job_ids, submission.specs, strict=True))
        if self.reverse:
            jobs.reverse()
        if self.truncate:
            jobs.pop()
        for entry, (job_id, spec) in enumerate(jobs, start=1):
            if entry <= max(request.after_entry, freed):
                continue
            if job_id in request.drafts_of:
                for draft in self.drafts(job_id):
                    yield trace_pb2.StreamResultsResponse(drafts=[draft])
            chunks = self._finish(spec, job_id)
            seen = request.after_chunk if entry == request.after_entry + 1 else 0
            for chunk in chunks[seen:]:
                with self._lock:
                    self.sent += 1
                    drop = self.sent in self.drop_at
                if drop:
                    self.at_drop()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
                yield trace_pb2.StreamResultsResponse(
                    events=[trace_pb2.ResultEvent(entry=entry, chunk=chunk)]
                )

    def _finish(self, spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        with self._lock:
            held = job_id not in self.ended
        if held:
            self.hold(spec)
        with self.changed:
            if self.ended.get(job_id) == types_pb2.JOB_STATE_CANCELLED:
                message = "cancelled by its submitter"
                return [
                    failed_chunk(job_id, types_pb2.JOB_STATE_CANCELLED, code_pb2.CANCELLED, message)
                ]
            chunks = (
                self.run(spec, job_id) if self.run else chunks_of(spec, job_id, self.piece_bytes)
            )
            self.ended[job_id] = chunks[-1].end.state
            self.changed.notify_all()
        return chunks

    def AcknowledgeResults(
        self, request: trace_pb2.AcknowledgeResultsRequest, context: Any
    ) -> trace_pb2.AcknowledgeResultsResponse:
        with self.changed:
            if self.acknowledge_errors:
                self.acknowledge_errors -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            # One that is tried again may come after a later one.
            self.acknowledged[request.submission_id] = max(
                request.through_entry, self.acknowledged.get(request.submission_id, 0)
            )
            self.changed.notify_all()
        return trace_pb2.AcknowledgeResultsResponse()

    def CancelJobs(
        self, request: trace_pb2.CancelJobsRequest, context: Any
    ) -> trace_pb2.CancelJobsResponse:
        with self.changed:
            if request.submission_id:
                if request.submission_id not in self.submissions:
                    context.abort(grpc.StatusCode.NOT_FOUND, "the submission is not known here")
                named = self.submissions[request.submission_id].job_ids
            else:
                known = {name for s in self.submissions.values() for name in s.job_ids}
                named = [name for name in request.job_ids if name in known]
            ended = [name for name in named if name not in self.ended]
            self.cancelled += ended
            self.ended.update(dict.fromkeys(ended, types_pb2.JOB_STATE_CANCELLED))
            self.changed.notify_all()
        return trace_pb2.CancelJobsResponse(cancelled=len(ended))

    def GetJobs(self, request: trace_pb2.GetJobsRequest, context: Any) -> trace_pb2.GetJobsResponse:
        response = trace_pb2.GetJobsResponse()
        with self._lock:
            known = {name for s in self.submissions.values() for name in s.job_ids}
            for name in request.job_ids:
                status = response.jobs.add(job_id=name)
                if name in known:
                    status.state = self.ended.get(name, types_pb2.JOB_STATE_LEASED)
                    status.attempt, status.worker_id = 1, "w1"
        return response

    def wait_cancelled(self, *job_ids: str, timeout: float = 5) -> None:
        """Wait until these jobs are cancelled, and no others."""
        with self.changed:
            done = self.changed.wait_for(lambda: set(job_ids) <= set(self.cancelled), timeout)
        assert done, f"cancelled: {self.cancelled}"
        assert sorted(self.cancelled) == sorted(job_ids)

    def ListModels(
        self, request: trace_pb2.ListModelsRequest, context: Any
    ) -> trace_pb2.ListModelsResponse:
        response = trace_pb2.ListModelsResponse()
        for name, revision, workers in self.served:
            model = types_pb2.ModelInfo(
                name=name, revision=revision, architecture="LlamaForCausalLM", layers=LAYERS,
                hidden_size=HIDDEN, heads=2, context_length=128, parameters=1234567,
                dtype=types_pb2.SCALAR_TYPE_BFLOAT16, sites=["embed", "resid"], rules=["attnlrp"],
                reductions=["token"],
            )  # fmt: skip
            response.models.add(model=model, workers=workers)
        return response

    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Any
    ) -> admin_pb2.GetStatusResponse:
        response = admin_pb2.GetStatusResponse(
            version="0.1.0", redis_version="7.2", redis_memory_bytes=1 << 20,
            ended={"succeeded": self.succeeded},
        )  # fmt: skip
        response.queues.add(model="fake", queued=3, leased=1)
        response.tenants.add(tenant="team-a", jobs=3, bytes=1300, unread_bytes=1200)
        worker = response.workers.add(worker_id="w1", device="cpu", version="0.1.0", leased=1)
        worker.model.name = "fake"
        worker.further_models.add(name="fake-2")
        worker.connected_at.FromSeconds(1_700_000_000)
        return response

    succeeded: int = 5
    drained: list[str] = field(default_factory=list)
    silent: float = 0.0

    def ListWorkers(
        self, request: admin_pb2.ListWorkersRequest, context: Any
    ) -> admin_pb2.ListWorkersResponse:
        workers = self.GetStatus(admin_pb2.GetStatusRequest(), context).workers
        for worker in workers:
            worker.draining = worker.worker_id in self.drained
            if self.silent:
                worker.silent.FromNanoseconds(round(self.silent * 1e9))
        return admin_pb2.ListWorkersResponse(workers=workers)

    def DrainWorkers(
        self, request: admin_pb2.DrainWorkersRequest, context: Any
    ) -> admin_pb2.DrainWorkersResponse:
        for index, worker_id in enumerate(request.worker_ids):
            if worker_id != "w1":
                _unknown(context, f"worker_ids[{index}]", f"no worker {worker_id!r} is connected")
        self.drained += request.worker_ids
        return admin_pb2.DrainWorkersResponse()

    def ForgetModels(
        self, request: admin_pb2.ForgetModelsRequest, context: Any
    ) -> admin_pb2.ForgetModelsResponse:
        for index, name in enumerate(request.models):
            if name not in [served[0] for served in self.served]:
                _unknown(context, f"models[{index}]", f"no model {name!r} is known")
        gone = [served for served in self.served if served[0] in request.models]
        self.served = [served for served in self.served if served not in gone]
        routes = [route for name, rev, _ in gone for route in (name, f"{name}@{rev}")]
        return admin_pb2.ForgetModelsResponse(routes=routes)

    quarantined: list[admin_pb2.QuarantinedJob] = field(default_factory=list)
    tenants: dict[str, admin_pb2.Tenant] = field(default_factory=dict)

    def ListQuarantinedJobs(
        self, request: admin_pb2.ListQuarantinedJobsRequest, context: Any
    ) -> admin_pb2.ListQuarantinedJobsResponse:
        return admin_pb2.ListQuarantinedJobsResponse(jobs=self.quarantined[: request.limit])

    def RequeueQuarantinedJobs(
        self, request: admin_pb2.RequeueQuarantinedJobsRequest, context: Any
    ) -> admin_pb2.RequeueQuarantinedJobsResponse:
        known = {job.job_id for job in self.quarantined}
        for index, job_id in enumerate(request.job_ids):
            if job_id not in known:
                _unknown(context, f"job_ids[{index}]", f"no quarantined job {job_id!r}")
        self.quarantined = [job for job in self.quarantined if job.job_id not in request.job_ids]
        response = admin_pb2.RequeueQuarantinedJobsResponse()
        for job_id in request.job_ids:
            response.jobs.add(
                quarantined_job_id=job_id, submission_id="again", job_id=f"again-{job_id}"
            )
        return response

    def ListTenants(
        self, request: admin_pb2.ListTenantsRequest, context: Any
    ) -> admin_pb2.ListTenantsResponse:
        return admin_pb2.ListTenantsResponse(tenants=self.tenants.values())

    def SetTenant(
        self, request: admin_pb2.SetTenantRequest, context: Any
    ) -> admin_pb2.SetTenantResponse:
        tenant = self.tenants.setdefault(request.tenant, admin_pb2.Tenant(tenant=request.tenant))
        for name in ("weight", "max_jobs", "max_bytes"):
            if request.HasField(name):
                setattr(tenant, name, getattr(request, name))
        return admin_pb2.SetTenantResponse(tenant=tenant)


def _unknown(context: Any, name: str, description: str) -> None:
    fault = error_details_pb2.BadRequest.FieldViolation(field=name, description=description)
    bad = error_details_pb2.BadRequest(field_violations=[fault])
    status = status_with(grpc.StatusCode.NOT_FOUND, "unknown", bad)
    context.abort_with_status(rpc_status.to_status(status))


class _Guard(grpc.ServerInterceptor):
    """Asks for the token, as the scheduler does."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        presented = dict(details.invocation_metadata).get("authorization", "")
        self._server.presented.append(presented)
        self._server.before(details.method.rpartition("/")[2])
        if self._server.token is None or presented == f"Bearer {self._server.token}":
            return continuation(details)

        def refuse(requests: Any, context: Any) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here")

        return grpc.stream_stream_rpc_method_handler(refuse)


__all__ = ["FakeServer", "code_pb2"]
