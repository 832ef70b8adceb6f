"""Runs leased jobs: tokenizing on one thread, the engine on another, encoding on a third."""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine import REDUCTIONS, SITES, Engine
from reltrace_worker.engine.atlas import Slice
from reltrace_worker.engine.generate import Writing
from reltrace_worker.errors import DeviceLostError, EngineError, InvalidJob, PassFailedError
from reltrace_worker.jobs import JobResult, JobSpec, PreparedCorpus, PreparedJob
from reltrace_worker.metrics import PassStats
from reltrace_worker.model import JobPreparer, LoadedModel
from reltrace_worker.model.vocabulary import Vocabulary
from reltrace_worker.rules import RULES
from reltrace_worker.session.convert import job_spec
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.encoding import Done, Encoder, Ready, broken, invalid
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.stored import LargeResults
from reltrace_worker.tracing import NoSpans, Spans

log = structlog.get_logger()

_HANDICAPS = {types_pb2.PRIORITY_BATCH: 5.0}
"""Seconds by which a job that came earlier lets an interactive one go first: not for ever."""

_STEPS = 16
"""Tokens by which texts go on before another pass has its turn."""

_PASSES_AHEAD = 2
"""The pass under way and the one that follows it."""


@dataclass(slots=True, eq=False)
class _Open:
    """What takes many passes: texts that are written together, or the atlas of a corpus."""

    batch: list[Ready]
    work: Writing | Slice
    crowded: bool
    seconds: float = 0.0


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
    drafts : Drafts, optional
        Takes texts as they are written.
    """

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        max_tokens: int,
        engine_thread: ThreadPoolExecutor | None = None,
        spans: Spans | None = None,
        drafts: Drafts | None = None,
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
        self._ready: deque[Ready] = deque()
        self._passes: deque[asyncio.Future[Done | None]] = deque()
        self._arrived = asyncio.Event()
        self._crowded = False
        # What is half done: it goes on in turns with what is ready.
        self._open: deque[_Open] = deque()
        self._text_is_next = False
        self._encoder = Encoder(model, engine.attention)
        self._spans = spans or NoSpans()
        self._drafts = drafts or Drafts()
        self._vocabulary = Vocabulary(model.tokenizer)
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
        """Forget jobs that wait for a pass, and write no more of texts."""
        with self._lock:
            self._ready = deque(job for job in self._ready if job.key not in keys)
            for texts in self._open:
                for index, job in enumerate(texts.batch):
                    if job.key in keys:
                        texts.work.drop(index)
        self._drafts.forget(keys)

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
        self._encoder.large = large

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
                return await loop.run_in_executor(self._encode_thread, self._encoder.encode, done)

    def _order_passes(self) -> None:
        """Let the engine's thread run a pass, and another after it, if jobs wait."""
        loop = asyncio.get_running_loop()
        while (self._ready or self._open) and len(self._passes) < _PASSES_AHEAD:
            self._passes.append(loop.run_in_executor(self._engine_thread, self._run))

    def _next_batch(self) -> list[Ready]:
        """Take what goes into one pass: the job whose turn it is, and what goes with it.

        That is, in the order of their turns, what is of its kind (another would be another pass)
        and still fits. What is passed over stays in order, and comes first before long.
        """
        with self._lock:
            # Of what takes many passes one of each kind at a time: it holds memory meanwhile.
            begun = {work.batch[0].job.kind for work in self._open}
            kinds = (job.job.kind for job in self._ready)
            kind = next((kind for kind in kinds if kind not in begun), None)
            if kind is None:
                return []
            batch: list[Ready] = []
            left: deque[Ready] = deque()
            tokens = 0
            for job in self._ready:
                length = job.job.extent
                fits = tokens + length <= self._max_tokens and not _is_corpus(job)
                if job.job.kind == kind and (not batch or fits):
                    batch.append(job)
                    tokens += length
                else:
                    left.append(job)
            self._ready = left
            self._note_running(batch)
        return batch

    def _note_running(self, batch: Sequence[Ready] = ()) -> None:
        half_done = [job for texts in self._open for job in texts.batch]
        self.running = frozenset(job.key for job in [*batch, *half_done])

    def _next_texts(self) -> "_Open | None":
        """Take texts that are half written, where nothing is ready or it is their turn."""
        with self._lock:
            if not self._open or (self._ready and not self._text_is_next):
                self._text_is_next = bool(self._open)
                return None
            self._text_is_next = False
            # Among them still: jobs are dropped in mid-turn too.
            texts = self._open[0]
            self._open.rotate(-1)
            self._note_running(texts.batch)
            return texts

    def _prepare(self, leases: Sequence[worker_pb2.Lease]) -> tuple[list[Ready], list[Chunks]]:
        ready: list[Ready] = []
        faulty: list[Chunks] = []
        now = time.monotonic()
        for lease in leases:
            try:
                job = self._prepared(job_spec(lease.spec))
            except InvalidJob as error:
                faulty.append(invalid(lease, error))
            except Exception as error:
                # A fault of the tokenizer or of ours must not take the worker down.
                log.exception("job.prepare_failed", job=lease.job_id, tenant=lease.tenant)
                faulty.append(broken(lease, error))
            else:
                key = LeaseKey(lease.job_id, lease.attempt)
                ready.append(Ready(key, lease, job, now + _HANDICAPS.get(lease.priority, 0.0)))
        return ready, faulty

    def _prepared(self, spec: JobSpec) -> PreparedJob | PreparedCorpus:
        prepare = self._prepare_job
        return prepare.prepare(spec) if spec.corpus is None else prepare.prepare_corpus(spec)

    def _run(self) -> Done | None:
        texts = self._next_texts()
        if texts is not None:
            return self._go_on(texts)
        batch = self._next_batch()
        if not batch:
            return None
        crowded = bool(self._ready)
        work = self._begun([job.job for job in batch])
        if work is not None:
            texts = _Open(batch, work, crowded)
            with self._lock:
                self._open.append(texts)
            return self._go_on(texts)
        started = time.perf_counter()
        try:
            results = self._run_engine(batch)
        finally:
            with self._lock:
                self._note_running()
        return self._done(batch, results, time.perf_counter() - started, crowded)

    def _begun(self, jobs: Sequence[PreparedJob | PreparedCorpus]) -> Writing | Slice | None:
        """Begin what takes many passes; None: one is enough."""
        if isinstance(jobs[0], PreparedCorpus):
            return self._engine.begin_atlas(jobs[0])
        texts = [j for j in jobs if isinstance(j, PreparedJob) and j.generation is not None]
        return self._engine.begin(texts) if texts else None

    def _go_on(self, texts: "_Open") -> Done | None:
        """Go on for a while with what takes many passes; None: it is not over."""
        started = time.perf_counter()
        results: Sequence[JobResult | EngineError] | None = None
        work = texts.work
        try:
            if isinstance(work, Slice):
                if not work.over:
                    self._engine.add_to(work)
                results = self._engine.atlas(work) if work.over else None
            else:
                self._engine.go_on(work, _STEPS, self._drafting(texts.batch, work))
                results = self._engine.texts(work) if work.over else None
        except DeviceLostError:
            raise
        except Exception as error:
            log.warning("work.failed", jobs=len(texts.batch), error=str(error))
            # Texts from their beginning, in smaller batches where it was for memory.
            results = (
                [error if isinstance(error, EngineError) else PassFailedError(str(error))]
                if isinstance(work, Slice)
                else self._run_engine(texts.batch)
            )
        texts.seconds += time.perf_counter() - started
        with self._lock:
            if results is not None:
                self._open.remove(texts)
            self._note_running()
        if results is None:
            return None
        return self._done(texts.batch, results, texts.seconds, texts.crowded)

    def _drafting(self, batch: Sequence[Ready], work: Writing) -> Callable[[], None] | None:
        """Return what notes the texts that somebody reads along with; None: there is none."""
        followed = [
            (index, job.key) for index, job in enumerate(batch) if job.lease.spec.generation.stream
        ]

        def note() -> None:
            for index, key in followed:
                self._drafts.note(key, work.token_ids(index), self._vocabulary)

        return note if followed else None

    def _done(
        self,
        batch: list[Ready],
        results: Sequence[JobResult | EngineError],
        seconds: float,
        crowded: bool,
    ) -> Done:
        self._drafts.forget(job.key for job in batch)
        of_tenants: Counter[str] = Counter()
        for job, result in zip(batch, results, strict=True):
            of_tenants[job.lease.tenant] += _tokens(job, result)
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
                    tokens=job.job.extent,
                    jobs_in_pass=len(batch),
                    tokens_in_pass=tokens,
                )
        log.debug("pass.done", jobs=len(batch), tokens=tokens, seconds=round(seconds, 4))
        return Done(batch, results, seconds, crowded)

    def _run_engine(self, jobs: Sequence[Ready]) -> Sequence[JobResult | EngineError]:
        try:
            return self._engine.run([j.job for j in jobs if isinstance(j.job, PreparedJob)])
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


def _is_corpus(job: Ready) -> bool:
    return isinstance(job.job, PreparedCorpus)


def _tokens(job: Ready, result: JobResult | EngineError) -> int:
    """Return how many tokens went through the model for a job."""
    if isinstance(job.job, PreparedCorpus):
        return job.job.extent
    written = result.written if isinstance(result, JobResult) else None
    return len(job.job.token_ids) + (len(written.token_ids) if written else 0)
