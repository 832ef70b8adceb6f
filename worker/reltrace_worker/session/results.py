"""Encodes results as numbered chunks, or puts tensors into a store and says where."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import chain, count

import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine import result_bytes
from reltrace_worker.lrp import Rule
from reltrace_worker.lrp.ops import is_compiled
from reltrace_worker.models import LoadedModel
from reltrace_worker.session.headers import atlas_header, generated_text, prompt_header
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.queue import QueuedJob
from reltrace_worker.session.store import LargeResults, Tensors, write
from reltrace_worker.session.tensors import cast, raw_bytes, result_dtype, scalar_type
from reltrace_worker.types.errors import (
    EngineError,
    InvalidJob,
    PassFailedError,
    ResultTooLargeError,
    Violation,
)
from reltrace_worker.types.jobs import AtlasJob, Job, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import Outcome

log = structlog.get_logger()

MIB = 1 << 20

CHUNK_BYTES = MIB
"""Bytes of tensor data in one chunk."""

_VERSIONS = {name: version(name) for name in ("torch", "transformers", "reltrace-worker")}


@dataclass(frozen=True, slots=True)
class EndedJobs:
    """Jobs that have ended with a pass, or with a task, and the seconds that it took."""

    jobs: Sequence[tuple[QueuedJob, Outcome]]
    seconds: float
    # As in JobRunner.
    full_pass_jobs: int


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """The result of a job that succeeded."""

    lease: worker_pb2.Lease
    header: types_pb2.TraceHeader
    tensors: Tensors
    timings: types_pb2.Timings
    generated: types_pb2.Generated | None = None

    def chunks(self) -> Iterator[worker_pb2.LeasedChunk]:
        """Yield the chunks, numbered from 1, one at a time: large results are not held twice."""
        leased = self._first_chunk()
        room = CHUNK_BYTES
        for tensor, values in self.tensors:
            data = raw_bytes(values)
            offset = 0
            while offset < len(data) or not data:
                if room == 0:
                    yield leased
                    leased = self._chunk(leased.chunk.number + 1)
                    room = CHUNK_BYTES
                piece = data[offset : offset + room]
                leased.chunk.tensors.add(
                    trace=tensor.trace,
                    site=tensor.site,
                    part=tensor.part,
                    dtype=scalar_type(values.dtype),
                    shape=values.shape,
                    offset=offset,
                    data=piece.tobytes(),
                )
                offset += len(piece)
                room -= len(piece)
                if not data:
                    break
        yield self._ended(leased)

    def stored_chunk(self, manifest: types_pb2.Manifest) -> worker_pb2.LeasedChunk:
        """Return the only chunk where the tensors are in a store."""
        leased = self._first_chunk()
        leased.chunk.manifest.CopyFrom(manifest)
        return self._ended(leased)

    def _chunk(self, number: int) -> worker_pb2.LeasedChunk:
        # Filled in place: to give a message to another is to serialize and parse it.
        leased = worker_pb2.LeasedChunk(attempt=self.lease.attempt)
        leased.chunk.job_id, leased.chunk.number = self.lease.job_id, number
        return leased

    def _first_chunk(self) -> worker_pb2.LeasedChunk:
        leased = self._chunk(1)
        leased.chunk.header.CopyFrom(self.header)
        if self.generated is not None:
            leased.chunk.generated.CopyFrom(self.generated)
        return leased

    def _ended(self, leased: worker_pb2.LeasedChunk) -> worker_pb2.LeasedChunk:
        end = leased.chunk.end
        end.state, end.attempt = types_pb2.JOB_STATE_SUCCEEDED, self.lease.attempt
        end.timings.CopyFrom(self.timings)
        return leased


class ResultEncoder:
    """Encodes the results of passes; results that `large` takes are put into its store."""

    def __init__(self, model: LoadedModel, attention: str, rules: Mapping[str, Rule]) -> None:
        self.large = LargeResults()
        self._model = model
        self._attention = attention
        self._functions = {name: rule.functions for name, rule in rules.items()}
        self._lxt = {"lxt": version("lxt")} if "lxt" in self._functions.values() else {}
        self._plain_attention = str(model.model.config._attn_implementation)
        # Names files in the stores that jobs name.
        self._name, self._files = secrets.token_hex(8), count(1)

    def encode(self, ended: EndedJobs, on_step: Callable[[], None]) -> list[Chunks | FailedAttempt]:
        """Return an iterator of chunks per job, or why there is none."""
        encoded: list[Chunks | FailedAttempt] = []
        shards: dict[tuple[str, str], list[EncodedResult]] = {}
        for job, outcome in ended.jobs:
            on_step()
            try:
                result = self._encode(job, outcome, ended.seconds + job.seconds - job.joined)
                if not isinstance(result, EncodedResult):
                    encoded.append(result)
                elif uri := job.lease.spec.output_uri:
                    root = self.large.output_root(uri, job.lease.tenant)
                    shards.setdefault((uri, root), []).append(result)
                elif self.large.takes(result.tensors):
                    name = f"{job.key.job_id}.{job.key.attempt}.safetensors"
                    encoded += _store(self.large.url, name, [result], on_step)
                else:
                    # The first chunk, for most jobs the only one, is made here and not on the
                    # loop; the others one by one as they are sent.
                    chunks = result.chunks()
                    encoded.append(chain([next(chunks)], chunks))
            except Exception as error:
                log.exception("job.encode_failed", job=job.key.job_id, tenant=job.lease.tenant)
                encoded.append(internal_error(job.lease, error))
        for (uri, root), results in shards.items():
            name = f"shard-{self._name}-{next(self._files):06d}.safetensors"
            encoded += _store(uri, name, results, on_step, root)
        return encoded

    def check_store(self, lease: worker_pb2.Lease) -> None:
        """Raise `InvalidJob` if a job names a folder that it may not write to."""
        if lease.spec.output_uri:
            self.large.output_root(lease.spec.output_uri, lease.tenant)

    def check_size(self, spec: types_pb2.JobSpec, job: Job) -> None:
        """Raise `ResultTooLargeError` if the tensors of a job could not be sent nor stored."""
        size = result_bytes(job, self._model.shape, result_dtype(spec))
        if spec.output_uri or self.large.has_room(size):
            return
        if isinstance(job, AtlasJob):
            what, fewer = f"atlas of {job.k} places", "fewer places (top_k)"
        else:
            what = f"result of {len(job.token_ids)} tokens"
            fewer = (
                "fewer layers, sites or targets, or for less of each: reduce='topk', 'token' or "
                "'feature', dtype='bfloat16'"
            )
        raise ResultTooLargeError(
            f"the {what} would have {size} bytes ({size / MIB:.3g} MiB), and at most "
            f"{self.large.most} ({self.large.most / MIB:.3g} MiB) go through the queue; ask for "
            f"{fewer}; or have large results stored: output_uri, or the scheduler's --results-url"
        )

    def tokenized(self, lease: worker_pb2.Lease, prompt: TokenizedPrompt) -> Chunks:
        """Return the result of a job that needs no pass: how its input is read."""
        header = prompt_header(prompt, self._provenance(), range(self._model.shape.layers))
        timings = types_pb2.Timings(queued=lease.queued_for)
        return iter(list(EncodedResult(lease, header, (), timings).chunks()))

    def _encode(
        self, job: QueuedJob, outcome: Outcome, seconds: float
    ) -> EncodedResult | Chunks | FailedAttempt:
        """Return the result of a job that succeeded; of another, how it ends."""
        lease = job.lease
        if isinstance(outcome, PassFailedError):
            return FailedAttempt(job.key, str(outcome))
        if isinstance(outcome, InvalidJob):
            return invalid(lease, outcome)
        if isinstance(outcome, EngineError):
            return internal_error(lease, outcome)
        dtype = result_dtype(lease.spec)
        try:
            tensors = [(tensor, cast(tensor, dtype)) for tensor in outcome.tensors]
        except InvalidJob as error:
            return invalid(lease, error)
        engine_time = Duration()
        engine_time.FromTimedelta(timedelta(seconds=seconds))
        timings = types_pb2.Timings(queued=lease.queued_for, engine=engine_time)
        provenance = self._provenance(job.job, outcome.checkpointing)
        layers: Sequence[int] = range(self._model.shape.layers)
        if isinstance(job.job, AtlasJob):
            header = atlas_header(job.job, outcome.targets, provenance, layers)
            return EncodedResult(lease, header, tensors, timings)
        if isinstance(job.job, TraceJob):
            layers = job.job.layers or layers
        header = prompt_header(job.job.prompt, provenance, layers, outcome.targets, outcome.hints)
        generated = None if outcome.generated is None else generated_text(outcome.generated)
        return EncodedResult(lease, header, tensors, timings, generated)

    def _provenance(
        self, job: Job | None = None, checkpointing: bool = False
    ) -> types_pb2.Provenance:
        """Return where the numbers of a job come from; without a job, there are none."""
        attention = functions = ""
        if isinstance(job, TraceJob | AtlasJob):
            attention, functions = self._attention, self._functions.get(job.rule, "")
            if functions == "fused" and is_compiled():
                functions = "compiled"
        elif job is not None:
            # Text is generated by the model as transformers runs it.
            attention = self._plain_attention
        return types_pb2.Provenance(
            model=self._model.name,
            revision=self._model.revision,
            rule=job.rule if job else "",
            reduction=job.reduction if job else "",
            dtype=scalar_type(self._model.dtype),
            attention=attention,
            checkpointing=checkpointing,
            versions=_VERSIONS | (self._lxt if functions == "lxt" else {}),
            rule_functions=functions,
            device=self._model.place,
        )


def _store(
    url: str,
    name: str,
    results: list[EncodedResult],
    on_step: Callable[[], None],
    root: str = "",
) -> list[Chunks | FailedAttempt]:
    """Write tensors to a store; each job's result then says where they are."""
    try:
        jobs = [(r.lease.job_id, r.tensors) for r in results]
        manifests = write(url, name, jobs, on_step, root)
    except PassFailedError as error:
        for result in results:
            lease = result.lease
            log.warning("store.failed", job=lease.job_id, tenant=lease.tenant, error=str(error))
        return [FailedAttempt(LeaseKey.of(result.lease), str(error)) for result in results]
    return [
        iter([result.stored_chunk(manifest)])
        for result, manifest in zip(results, manifests, strict=True)
    ]


def invalid(lease: worker_pb2.Lease, error: InvalidJob) -> Chunks:
    """Return the only chunk of a job that this model can not run."""
    return _failed(lease, code_pb2.INVALID_ARGUMENT, str(error), error.violations)


def internal_error(lease: worker_pb2.Lease, error: Exception) -> Chunks:
    """Return the only chunk of a job that could not be done."""
    return _failed(lease, code_pb2.INTERNAL, str(error) or type(error).__name__)


def too_large(lease: worker_pb2.Lease, error: ResultTooLargeError) -> Chunks:
    """Return the only chunk of a job whose result would be too large."""
    return _failed(lease, code_pb2.RESOURCE_EXHAUSTED, str(error))


def _failed(
    lease: worker_pb2.Lease, code: int, message: str, violations: Sequence[Violation] = ()
) -> Chunks:
    faults = [
        types_pb2.FieldViolation(field=v.field, description=v.description) for v in violations
    ]
    error = types_pb2.JobError(code=code, message=message, violations=faults)
    end = types_pb2.JobEnd(state=types_pb2.JOB_STATE_FAILED, attempt=lease.attempt, error=error)
    chunk = types_pb2.ResultChunk(job_id=lease.job_id, number=1, end=end)
    return iter([worker_pb2.LeasedChunk(attempt=lease.attempt, chunk=chunk)])
