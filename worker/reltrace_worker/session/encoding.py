"""Makes chunks of what passes gave, or puts tensors into a store and says where."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import chain, count

import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.lrp import Rule
from reltrace_worker.models import LoadedModel
from reltrace_worker.session.chunks import chunks, stored_chunk
from reltrace_worker.session.convert import (
    INTERNAL,
    INVALID_ARGUMENT,
    cast,
    corpus_header,
    failed,
    generated,
    header,
    result_dtype,
    scalar_type,
)
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.stored import LargeResults, Tensors, write
from reltrace_worker.types.errors import EngineError, InvalidJob, PassFailedError
from reltrace_worker.types.jobs import AtlasJob, Job, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult

log = structlog.get_logger()

VERSIONS = {name: version(name) for name in ("torch", "transformers", "reltrace-worker")}


@dataclass(frozen=True, slots=True)
class Ready:
    """A leased job that can go into a pass."""

    key: LeaseKey
    lease: worker_pb2.Lease
    job: Job
    turn: float
    """Monotonic time by which the jobs that wait are ordered."""


@dataclass(frozen=True, slots=True)
class Done:
    """A pass that is over, or jobs that have ended in one that goes on.

    crowded: how many jobs it took, if it left others behind.
    """

    batch: list[Ready]
    results: Sequence[JobResult | EngineError]
    seconds: float
    crowded: int


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a job that went well gives."""

    lease: worker_pb2.Lease
    header: types_pb2.TraceHeader
    tensors: Tensors
    timings: types_pb2.Timings
    generated: types_pb2.Generated | None


class Encoder:
    """Turns the results of passes into what is sent.

    Parameters
    ----------
    model : LoadedModel
        Whose results.
    attention : str
        Its kernel of attention, for their provenance.
    rules : mapping of str to Rule
        Its rules, for their provenance.

    Attributes
    ----------
    large : LargeResults
        Where results go that are too large to be sent.
    """

    def __init__(self, model: LoadedModel, attention: str, rules: Mapping[str, Rule]) -> None:
        self.large = LargeResults()
        self._model = model
        self._attention = attention
        self._functions = {name: rule.functions for name, rule in rules.items()}
        self._lxt = {"lxt": version("lxt")} if "lxt" in self._functions.values() else {}
        self._plain_attention = str(model.model.config._attn_implementation)
        # Names files in stores of others' choosing.
        self._name, self._files = secrets.token_hex(8), count(1)

    def encode(self, done: Done) -> list[Chunks | FailedAttempt]:
        """Return an iterator of chunks per job, or why there is none."""
        encoded: list[Chunks | FailedAttempt] = []
        shards: dict[str, list[_Tensors]] = {}
        for job, result in zip(done.batch, done.results, strict=True):
            try:
                found = self._tensors(job, result, done.seconds)
                if not isinstance(found, _Tensors):
                    encoded.append(found)
                elif uri := job.lease.spec.output_uri:
                    shards.setdefault(uri, []).append(found)
                elif self.large.takes(found.tensors):
                    name = f"{job.key.job_id}.{job.key.attempt}.safetensors"
                    encoded += _store(self.large.url, name, [found])
                else:
                    # The first chunk, for most jobs the only one, is made here and not on the
                    # loop; the others one by one as they are sent.
                    chunks_of = chunks(
                        job.lease, found.header, found.tensors, found.timings, found.generated
                    )
                    encoded.append(chain([next(chunks_of)], chunks_of))
            except Exception as error:
                log.exception("job.encode_failed", job=job.key.job_id, tenant=job.lease.tenant)
                encoded.append(chain(broken(job.lease, error)))
        for uri, jobs in shards.items():
            name = f"shard-{self._name}-{next(self._files):06d}.safetensors"
            encoded += _store(uri, name, jobs)
        return encoded

    def _tensors(
        self, job: Ready, result: JobResult | EngineError, seconds: float
    ) -> "_Tensors | Chunks | FailedAttempt":
        """Return what a job that went well gives; of another, how it ends."""
        lease = job.lease
        if isinstance(result, PassFailedError):
            return FailedAttempt(job.key, str(result))
        if isinstance(result, EngineError):
            return broken(lease, result)
        dtype = result_dtype(lease.spec)
        try:
            tensors = [(tensor, cast(tensor, dtype)) for tensor in result.tensors]
        except InvalidJob as error:
            return invalid(lease, error)
        engine_time = Duration()
        engine_time.FromTimedelta(timedelta(seconds=seconds))
        if result.generated is None:
            kernel, functions = self._attention, self._functions.get(job.job.rule, "")
        else:
            # Texts are written by the model as transformers runs it.
            kernel, functions = self._plain_attention, ""
        provenance = self._provenance(job.job, kernel, functions, result.checkpointing)
        layers = self._model.shape.layers
        return _Tensors(
            lease,
            corpus_header(job.job, result.targets, provenance, layers)
            if isinstance(job.job, AtlasJob)
            else header(
                job.job.prompt, provenance, _layers(job.job, layers), result.targets, result.hints
            ),
            tensors,
            types_pb2.Timings(queued=lease.queued_for, engine=engine_time),
            None if result.generated is None else generated(result.generated),
        )

    def tokenized(self, lease: worker_pb2.Lease, job: TokenizedPrompt) -> Chunks:
        """Return the result of a job that needs no pass: how its input is read."""
        provenance = self._provenance(job, "", "", checkpointing=False)
        timings = types_pb2.Timings(queued=lease.queued_for)
        found = header(job, provenance, range(self._model.shape.layers))
        return iter(list(chunks(lease, found, (), timings)))

    def _provenance(
        self,
        job: Job | TokenizedPrompt,
        attention: str,
        functions: str,
        checkpointing: bool,
    ) -> types_pb2.Provenance:
        return types_pb2.Provenance(
            model=self._model.name,
            revision=self._model.revision,
            rule="" if isinstance(job, TokenizedPrompt) else job.rule,
            reduction="" if isinstance(job, TokenizedPrompt) else job.reduction,
            dtype=scalar_type(self._model.dtype),
            attention=attention,
            checkpointing=checkpointing,
            versions=VERSIONS | (self._lxt if functions == "lxt" else {}),
            rule_functions=functions,
            device=str(self._model.device),
        )


def _layers(job: Job, layers: int) -> Sequence[int]:
    return (isinstance(job, TraceJob) and job.layers) or range(layers)


def _store(url: str, name: str, jobs: list[_Tensors]) -> list[Chunks | FailedAttempt]:
    """Write tensors to a store; each job's result then says where they are."""
    try:
        manifests = write(url, name, [(job.lease.job_id, job.tensors) for job in jobs])
    except PassFailedError as error:
        for job in jobs:
            log.warning(
                "store.failed", job=job.lease.job_id, tenant=job.lease.tenant, error=str(error)
            )
        return [FailedAttempt(LeaseKey.of(job.lease), str(error)) for job in jobs]
    return [
        iter([stored_chunk(job.lease, job.header, manifest, job.timings)])
        for job, manifest in zip(jobs, manifests, strict=True)
    ]


def invalid(lease: worker_pb2.Lease, error: InvalidJob) -> Chunks:
    """Yield how a job ends that its client got wrong."""
    yield failed(lease.job_id, lease.attempt, INVALID_ARGUMENT, str(error), error.violations)


def broken(lease: worker_pb2.Lease, error: Exception) -> Chunks:
    """Yield how a job ends that could not be done."""
    yield failed(lease.job_id, lease.attempt, INTERNAL, str(error) or type(error).__name__)
