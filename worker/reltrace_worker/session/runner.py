"""Runs leased jobs: tokenizing on one thread, the engine on another, encoding on a third."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine import Engine
from reltrace_worker.engine.generation import Generation
from reltrace_worker.engine.preparing import JobPreparer
from reltrace_worker.models import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.observability.metrics import PassStats
from reltrace_worker.session.convert import read_request
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.encoding import Done, Encoder, Ready, broken, invalid
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.stored import LargeResults
from reltrace_worker.session.turns import HalfDone, Outcome, Turns
from reltrace_worker.types.errors import DeviceLostError, EngineError, InvalidJob, PassFailedError
from reltrace_worker.types.jobs import AtlasJob, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult

log = structlog.get_logger()

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
        Most tokens in one pass; a longer prompt is a pass of its own.
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
        self._preparer = JobPreparer(model)
        self._max_tokens = max_tokens
        self._turns = Turns(max_tokens)
        self._text_thread = ThreadPoolExecutor(1, "text")
        self._corpus_thread = ThreadPoolExecutor(1, "corpus")
        self._engine_thread = engine_thread or ThreadPoolExecutor(1, "engine")
        self._encode_thread = ThreadPoolExecutor(1, "encode")
        # Leases that are being prepared; of the loop.
        self._wanted: set[LeaseKey] = set()
        self._passes: deque[asyncio.Future[Done | None]] = deque()
        self._arrived = asyncio.Event()
        self._crowded = 0
        self._encoder = Encoder(model, engine.attention, engine.rules)
        self._spans = spans or Spans()
        self._drafts = drafts or Drafts()
        self._vocabulary = Vocabulary(model.tokenizer)
        self.stats = PassStats(seconds=engine.seconds)

    @property
    def running(self) -> frozenset[LeaseKey]:
        """Leases in the pass that is under way, and in what is half done."""
        return self._turns.running

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        """Tokenize and check jobs; they wait for a pass.

        Returns
        -------
        list of iterators of chunks
            One for each job that ends without a pass: it is invalid, or asks for tokens only.
        """
        self._wanted |= {LeaseKey.of(lease) for lease in leases}
        # A corpus takes its time, and others do not wait for it.
        corpora = [lease for lease in leases if lease.spec.HasField("corpus")]
        others = [lease for lease in leases if not lease.spec.HasField("corpus")]
        ended = await asyncio.gather(
            self._add(others, self._text_thread), self._add(corpora, self._corpus_thread)
        )
        return [*ended[0], *ended[1]]

    async def _add(
        self, leases: Sequence[worker_pb2.Lease], thread: ThreadPoolExecutor
    ) -> list[Chunks]:
        if not leases:
            return []
        loop = asyncio.get_running_loop()
        ready, ended = await loop.run_in_executor(thread, self._prepare, leases)
        # Without what was dropped meanwhile.
        ready = [job for job in ready if job.key in self._wanted]
        self._wanted -= {LeaseKey.of(lease) for lease in leases}
        if ready:
            self._turns.add(ready)
            self._order_passes()
            self._arrived.set()
        return ended

    def crowded(self) -> int:
        """Return how many jobs the pass of the last results took, if it left some behind."""
        return self._crowded

    def drop(self, keys: set[LeaseKey]) -> None:
        """Forget jobs that wait for a pass, and go on no more with what takes several."""
        self._wanted -= keys
        self._turns.drop(keys)
        self._drafts.forget(keys)

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that wait for a pass; return their leases."""
        keys = [*self._turns.take_back(), *self._wanted]
        self._wanted.clear()
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
                loop.run_in_executor(self._engine_thread, self._engine.trim)
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
        while self._turns and len(self._passes) < _PASSES_AHEAD:
            self._passes.append(loop.run_in_executor(self._engine_thread, self._run))

    def _prepare(self, leases: Sequence[worker_pb2.Lease]) -> tuple[list[Ready], list[Chunks]]:
        ready: list[Ready] = []
        ended: list[Chunks] = []
        now = time.monotonic()
        for lease in leases:
            key = LeaseKey.of(lease)
            if key not in self._wanted:
                continue
            try:
                job = self._preparer.prepare(read_request(lease.spec))
            except InvalidJob as error:
                ended.append(invalid(lease, error))
            except Exception as error:
                # A fault of the tokenizer or of ours must not take the worker down.
                log.exception("job.prepare_failed", job=lease.job_id, tenant=lease.tenant)
                ended.append(broken(lease, error))
            else:
                if isinstance(job, TokenizedPrompt):
                    ended.append(self._encoder.tokenized(lease, job))
                    continue
                ready.append(Ready(key, lease, job, now + _HANDICAPS.get(lease.priority, 0.0)))
        return ready, ended

    def _run(self) -> Done | None:
        half_done = self._turns.next_half_done()
        if half_done is not None:
            return self._go_on(half_done)
        batch = self._turns.next_batch()
        if not batch:
            return None
        crowded = len(batch) if self._turns.left_behind else 0
        if not isinstance(batch[0].job, TraceJob):
            return self._begin(batch, crowded)
        started = time.perf_counter()
        results: Sequence[Outcome] = ()
        try:
            results = self._run_engine(batch)
        finally:
            seconds = time.perf_counter() - started
            self._turns.passed(batch if results else (), seconds)
        return self._done(batch, results, seconds, crowded)

    def _begin(self, batch: list[Ready], crowded: int) -> Done | None:
        """Begin what takes many passes, and go on with it for a while."""
        try:
            work = self._engine.begin([job.job for job in batch])
        except DeviceLostError:
            raise
        except Exception as error:
            self._turns.passed()
            log.warning("work.failed", jobs=len(batch), error=str(error))
            return self._done(batch, [_failure(error)] * len(batch), 0.0, crowded)
        half_done = HalfDone(dict(enumerate(batch)), work, batch[0].job.batch_key, crowded)
        self._turns.begun(half_done)
        return self._go_on(half_done)

    def _go_on(self, half_done: HalfDone) -> Done | None:
        """Go on for a while with what takes many passes; return what has ended, if anything."""
        started = time.perf_counter()
        work = half_done.work
        ended: dict[int, Outcome]
        failed = False
        try:
            on_token = None
            if isinstance(work, Generation):
                on_token = self._drafting(half_done, work)
            self._engine.advance(work, on_token)
            ended = work.take_outcomes()
        except DeviceLostError:
            raise
        except Exception as error:
            failed = True
            log.warning("work.failed", jobs=len(half_done.batch), error=str(error))
            ended = dict.fromkeys(half_done.batch, _failure(error))
        half_done.seconds += time.perf_counter() - started
        over = failed or work.finished
        jobs = self._turns.ended(half_done, ended, over=over)
        if not jobs:
            return None
        spent, half_done.charged = half_done.seconds - half_done.charged, half_done.seconds
        batch, results = [job for job, _ in jobs], [result for _, result in jobs]
        return self._done(
            batch, results, half_done.seconds, half_done.crowded, spent=spent, over=over
        )

    def _drafting(self, half_done: HalfDone, work: Generation) -> Callable[[], None] | None:
        """Return what notes the texts that somebody reads along with; None: there is none."""

        def followed() -> list[tuple[int, Ready]]:
            return [
                (index, job)
                for index, job in half_done.batch.items()
                if job.lease.spec.generation.stream
            ]

        def note() -> None:
            # Nothing is noted of what is dropped and forgotten at this moment.
            with self._turns.lock:
                for index, job in followed():
                    self._drafts.note(job.key, work.token_ids(index), self._vocabulary)

        with self._turns.lock:
            return note if followed() else None

    def _done(
        self,
        batch: list[Ready],
        results: Sequence[Outcome],
        seconds: float,
        crowded: int,
        *,
        spent: float | None = None,
        over: bool = True,
    ) -> Done:
        """Account for jobs that have ended, of a pass that took so long.

        Of what takes many passes, they are charged with the `spent` part, and it may not be `over`.
        """
        self._drafts.forget(job.key for job in batch)
        of_tenants: Counter[str] = Counter()
        for job, result in zip(batch, results, strict=True):
            of_tenants[job.lease.tenant] += _tokens(job, result)
        tokens = of_tenants.total()
        self.stats.share(seconds if spent is None else spent, of_tenants)
        self.stats.tokens += tokens
        if over:
            self.stats.passes += 1
            # A longer prompt is a pass of its own.
            self.stats.capacity += max(tokens, self._turns.room)
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
                    tokens=job.job.total_tokens,
                    jobs_in_pass=len(batch),
                    tokens_in_pass=tokens,
                )
        log.debug("pass.done", jobs=len(batch), tokens=tokens, seconds=round(seconds, 4))
        return Done(batch, results, seconds, crowded)

    def _run_engine(self, jobs: Sequence[Ready]) -> Sequence[Outcome]:
        try:
            return self._engine.run([j.job for j in jobs if isinstance(j.job, TraceJob)])
        except DeviceLostError:
            raise
        except Exception as error:
            if len(jobs) == 1:
                (job,) = jobs
                log.exception("pass.failed", job=job.key.job_id, tenant=job.lease.tenant)
                return [_failure(error)]
            # One job must not cost its neighbours their results.
            log.warning("pass.split", jobs=len(jobs), error=str(error))
            return [result for job in jobs for result in self._run_engine([job])]


def _failure(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else PassFailedError(str(error))


def _tokens(job: Ready, result: Outcome) -> int:
    """Return how many tokens went through the model for a job."""
    if isinstance(job.job, AtlasJob):
        return job.job.total_tokens
    written = result.generated if isinstance(result, JobResult) else None
    return len(job.job.token_ids) + (len(written.token_ids) if written else 0)
