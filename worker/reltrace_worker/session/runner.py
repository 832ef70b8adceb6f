"""Runs leased jobs: tokenizing on one thread, the engine on another, encoding on a third."""

import asyncio
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import chain, count

import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine import REDUCTIONS, SITES, Engine
from reltrace_worker.errors import DeviceLostError, EngineError, InvalidJob, PassFailedError
from reltrace_worker.jobs import JobResult, PreparedJob
from reltrace_worker.metrics import PassStats
from reltrace_worker.model import JobPreparer, LoadedModel
from reltrace_worker.rules import RULES
from reltrace_worker.session.chunks import chunks, stored_chunk
from reltrace_worker.session.convert import (
    INTERNAL,
    INVALID_ARGUMENT,
    cast,
    failed,
    header,
    job_spec,
    result_dtype,
    scalar_type,
)
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.stored import LargeResults, Tensors, write
from reltrace_worker.tracing import NoSpans, Spans

log = structlog.get_logger()

VERSIONS = {name: version(name) for name in ("lxt", "torch", "transformers", "reltrace-worker")}


@dataclass(frozen=True, slots=True)
class _Ready:
    """A leased job that can go into a pass."""

    key: LeaseKey
    lease: worker_pb2.Lease
    job: PreparedJob
    turn: float
    """Monotonic time by which the jobs that wait are ordered."""


@dataclass(frozen=True, slots=True)
class _Done:
    """A pass that is over; crowded: it left jobs behind when it took these."""

    batch: list[_Ready]
    results: Sequence[JobResult | EngineError]
    seconds: float
    crowded: bool


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a job that went well gives."""

    lease: worker_pb2.Lease
    header: types_pb2.TraceHeader
    tensors: Tensors
    timings: types_pb2.Timings


_HANDICAPS = {types_pb2.PRIORITY_BATCH: 5.0}
"""Seconds by which a job that came earlier lets an interactive one go first: not for ever."""

_PASSES_AHEAD = 2
"""The pass under way and the one that follows it."""


class Runner:
    """Packs leased jobs into passes and gives back their chunks.

    Torch never runs on the event loop: heartbeats go on while it works. And the engine does not
    wait for the loop: when a pass is over its thread takes the next batch itself, out of the jobs
    that wait at that moment, while the last results are still being encoded.

    Parameters
    ----------
    max_tokens : int
        Tokens in one pass; a longer prompt is a pass of its own.
    engine_thread : ThreadPoolExecutor, optional
        One thread, on which passes run, shared with the runners of other models.
    spans : Spans, optional
        Takes what is done for jobs that are traced.
    """

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        max_tokens: int,
        engine_thread: ThreadPoolExecutor | None = None,
        spans: Spans | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._prepare_job = JobPreparer(model, sites=SITES, reductions=REDUCTIONS, rules=RULES)
        self._max_tokens = max_tokens
        self._text_thread = ThreadPoolExecutor(1, "text")
        self._engine_thread = engine_thread or ThreadPoolExecutor(1, "engine")
        self._encode_thread = ThreadPoolExecutor(1, "encode")
        # Shared by the loop, which adds and drops, and the engine's thread, which takes.
        self._lock = threading.Lock()
        self._ready: deque[_Ready] = deque()
        self._passes: deque[asyncio.Future[_Done | None]] = deque()
        self._arrived = asyncio.Event()
        self._crowded = False
        self._large = LargeResults()
        self._spans = spans or NoSpans()
        # Names files in stores of others' choosing.
        self._name, self._files = secrets.token_hex(8), count(1)
        self.stats = PassStats(seconds=engine.seconds)
        self.running: frozenset[LeaseKey] = frozenset()
        """Leases in the pass that is under way."""

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        """Tokenize and check jobs; they wait for a pass.

        Returns
        -------
        list of iterators of chunks
            One for each job that is invalid: it has failed already.
        """
        loop = asyncio.get_running_loop()
        ready, faulty = await loop.run_in_executor(self._text_thread, self._prepare, leases)
        with self._lock:
            self._ready = deque(sorted([*self._ready, *ready], key=lambda job: job.turn))
        if ready:
            self._order_passes()
            self._arrived.set()
        return faulty

    def crowded(self) -> bool:
        """Tell whether the pass of the last results left jobs behind for want of room."""
        return self._crowded

    def drop(self, keys: set[LeaseKey]) -> None:
        """Forget jobs that wait for a pass."""
        with self._lock:
            self._ready = deque(job for job in self._ready if job.key not in keys)

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that wait for a pass; return their leases."""
        with self._lock:
            keys = [job.key for job in self._ready]
            self._ready.clear()
        return keys

    def store_large(self, url: str, above: int) -> None:
        """Note where results of more than `above` bytes go; empty: they are sent as well.

        Raises
        ------
        StoreError
            This worker can not write there.
        """
        large = LargeResults(url, above)
        large.check()
        self._large = large

    async def next_results(self) -> list[Chunks | FailedAttempt]:
        """Wait for the next pass; return an iterator of chunks per job, or why there is none.

        Raises
        ------
        DeviceLostError
            This process can not run a pass any more.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._order_passes()
            if not self._passes:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            done = await self._passes.popleft()
            # Nothing: what this pass was ordered for went into the one before, or was dropped.
            if done is not None:
                self._crowded = done.crowded
                self._order_passes()
                return await loop.run_in_executor(self._encode_thread, self._encode, done)

    def _order_passes(self) -> None:
        """Let the engine's thread run a pass, and another after it, if jobs wait."""
        loop = asyncio.get_running_loop()
        while self._ready and len(self._passes) < _PASSES_AHEAD:
            self._passes.append(loop.run_in_executor(self._engine_thread, self._run))

    def _next_batch(self) -> list[_Ready]:
        """Take what goes into one pass: the job whose turn it is, and what goes with it.

        That is, in the order of their turns, what has its rule (another would be another pass) and
        still fits. What is passed over stays in order, and comes first before long.
        """
        with self._lock:
            if not self._ready:
                return []
            rule = self._ready[0].job.rule
            batch: list[_Ready] = []
            left: deque[_Ready] = deque()
            tokens = 0
            for job in self._ready:
                length = len(job.job.token_ids)
                if job.job.rule == rule and (not batch or tokens + length <= self._max_tokens):
                    batch.append(job)
                    tokens += length
                else:
                    left.append(job)
            self._ready = left
            self.running = frozenset(job.key for job in batch)
        return batch

    def _prepare(self, leases: Sequence[worker_pb2.Lease]) -> tuple[list[_Ready], list[Chunks]]:
        ready: list[_Ready] = []
        faulty: list[Chunks] = []
        now = time.monotonic()
        for lease in leases:
            try:
                job = self._prepare_job.prepare(job_spec(lease.spec))
            except InvalidJob as error:
                faulty.append(_invalid(lease, error))
            except Exception as error:
                # A fault of the tokenizer or of ours must not take the worker down.
                log.exception("job.prepare_failed", job=lease.job_id, tenant=lease.tenant)
                faulty.append(_broken(lease, error))
            else:
                key = LeaseKey(lease.job_id, lease.attempt)
                ready.append(_Ready(key, lease, job, now + _HANDICAPS.get(lease.priority, 0.0)))
        return ready, faulty

    def _run(self) -> _Done | None:
        batch = self._next_batch()
        if not batch:
            return None
        crowded = bool(self._ready)
        started = time.perf_counter()
        try:
            results = self._run_engine(batch)
        finally:
            self.running = frozenset()
        seconds = time.perf_counter() - started
        of_tenants: Counter[str] = Counter()
        for job in batch:
            of_tenants[job.lease.tenant] += len(job.job.token_ids)
        tokens = of_tenants.total()
        self.stats.share(seconds, of_tenants)
        self.stats.passes += 1
        self.stats.tokens += tokens
        # A longer prompt is a pass of its own.
        self.stats.capacity += max(tokens, self._max_tokens)
        failed = sum(isinstance(result, EngineError) for result in results)
        self.stats.failed += failed
        self.stats.jobs += len(batch) - failed
        for job in batch:
            if parent := job.lease.spec.traceparent:
                self._spans.record(
                    "reltrace.pass",
                    parent,
                    seconds,
                    job=job.key.job_id,
                    attempt=job.key.attempt,
                    tenant=job.lease.tenant,
                    model=self._model.name,
                    rule=job.job.rule,
                    tokens=len(job.job.token_ids),
                    jobs_in_pass=len(batch),
                    tokens_in_pass=tokens,
                )
        log.debug("pass.done", jobs=len(batch), tokens=tokens, seconds=round(seconds, 4))
        return _Done(batch, results, seconds, crowded)

    def _encode(self, done: _Done) -> list[Chunks | FailedAttempt]:
        encoded: list[Chunks | FailedAttempt] = []
        shards: dict[str, list[_Tensors]] = {}
        for job, result in zip(done.batch, done.results, strict=True):
            try:
                found = self._tensors(job, result, done.seconds)
                if not isinstance(found, _Tensors):
                    encoded.append(found)
                elif uri := job.lease.spec.output_uri:
                    shards.setdefault(uri, []).append(found)
                elif self._large.takes(found.tensors):
                    name = f"{job.key.job_id}.{job.key.attempt}.safetensors"
                    encoded += _store(self._large.url, name, [found])
                else:
                    # The first chunk, for most jobs the only one, is made here and not on the
                    # loop; the others one by one as they are sent.
                    chunks_of = chunks(job.lease, found.header, found.tensors, found.timings)
                    encoded.append(chain([next(chunks_of)], chunks_of))
            except Exception as error:
                log.exception("job.encode_failed", job=job.key.job_id, tenant=job.lease.tenant)
                encoded.append(chain(_broken(job.lease, error)))
        for uri, jobs in shards.items():
            name = f"shard-{self._name}-{next(self._files):06d}.safetensors"
            encoded += _store(uri, name, jobs)
        return encoded

    def _run_engine(self, jobs: Sequence[_Ready]) -> Sequence[JobResult | EngineError]:
        try:
            return self._engine.run([job.job for job in jobs])
        except DeviceLostError:
            raise
        except Exception as error:
            if len(jobs) == 1:
                (job,) = jobs
                log.exception("pass.failed", job=job.key.job_id, tenant=job.lease.tenant)
                return [error if isinstance(error, EngineError) else PassFailedError(str(error))]
            # One job must not cost its neighbours their results.
            log.warning("pass.split", jobs=len(jobs), error=str(error))
            return [result for job in jobs for result in self._run_engine([job])]

    def _tensors(
        self, job: _Ready, result: JobResult | EngineError, seconds: float
    ) -> "_Tensors | Chunks | FailedAttempt":
        """Return what a job that went well gives; of another, how it ends."""
        lease = job.lease
        if isinstance(result, PassFailedError):
            return FailedAttempt(job.key, str(result))
        if isinstance(result, EngineError):
            return _broken(lease, result)
        dtype = result_dtype(lease.spec)
        try:
            tensors = [(tensor, cast(tensor, dtype)) for tensor in result.tensors]
        except InvalidJob as error:
            return _invalid(lease, error)
        engine_time = Duration()
        engine_time.FromTimedelta(timedelta(seconds=seconds))
        return _Tensors(
            lease,
            header(
                job.job,
                result.targets,
                self._provenance(job.job, result),
                self._model.shape.layers,
            ),
            tensors,
            types_pb2.Timings(queued=lease.queued_for, engine=engine_time),
        )

    def _provenance(self, job: PreparedJob, result: JobResult) -> types_pb2.Provenance:
        return types_pb2.Provenance(
            model=self._model.name,
            revision=self._model.revision,
            rule=job.rule,
            reduction=job.reduction,
            dtype=scalar_type(self._model.dtype),
            attention=self._engine.attention,
            checkpointing=result.checkpointing,
            versions=VERSIONS,
            device=str(self._model.device),
        )


def _store(url: str, name: str, jobs: list[_Tensors]) -> list[Chunks | FailedAttempt]:
    """Write tensors to a store; each job's result then says where they are."""
    try:
        manifests = write(url, name, [(job.lease.job_id, job.tensors) for job in jobs])
    except PassFailedError as error:
        for job in jobs:
            log.warning(
                "store.failed", job=job.lease.job_id, tenant=job.lease.tenant, error=str(error)
            )
        return [
            FailedAttempt(LeaseKey(job.lease.job_id, job.lease.attempt), str(error)) for job in jobs
        ]
    return [
        iter([stored_chunk(job.lease, job.header, manifest, job.timings)])
        for job, manifest in zip(jobs, manifests, strict=True)
    ]


def _invalid(lease: worker_pb2.Lease, error: InvalidJob) -> Chunks:
    yield failed(lease.job_id, lease.attempt, INVALID_ARGUMENT, str(error), error.violations)


def _broken(lease: worker_pb2.Lease, error: Exception) -> Chunks:
    yield failed(lease.job_id, lease.attempt, INTERNAL, str(error) or type(error).__name__)
