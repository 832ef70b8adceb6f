"""Runs leased jobs: tokenizing on one thread, the engine on another, encoding on a third."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import structlog
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import worker_pb2

from reltrace_worker.engine import Engine, JobPreparer
from reltrace_worker.engine.generation import Generation
from reltrace_worker.models import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.observability.metrics import PassStats
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.leases import Chunks, FailedAttempt, LeaseKey
from reltrace_worker.session.queue import (
    PASS_SECONDS,
    QueuedJob,
    RequestQueue,
    RunningTask,
    queue_order,
)
from reltrace_worker.session.requests import read_request
from reltrace_worker.session.results import (
    EndedJobs,
    ResultEncoder,
    internal_error,
    invalid,
    too_large,
)
from reltrace_worker.session.store import LargeResults
from reltrace_worker.session.watchdog import LIMIT, Watchdog, Work
from reltrace_worker.types.errors import (
    DeviceLostError,
    EngineError,
    InvalidJob,
    PassFailedError,
    ResultTooLargeError,
)
from reltrace_worker.types.jobs import GenerateJob, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult, Outcome

log = structlog.get_logger()

_PASSES_AHEAD = 2
"""The pass under way and the one that follows it."""


class Runner:
    """Batches leased jobs into passes and gives back their chunks.

    Torch never runs on the event loop: heartbeats go on while it works. And the engine does not
    wait for the loop: when a pass is over its thread takes the next batch itself, out of the jobs
    that wait at that moment, while the last results are still being encoded.

    A pass has at most `max_tokens` tokens; a longer prompt is a pass of its own. Runners of other
    models may share the one engine thread, and then share `queues`, to which each adds its own.
    `pass_seconds` as in `RequestQueue`.
    """

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        max_tokens: int,
        engine_thread: ThreadPoolExecutor | None = None,
        spans: Spans | None = None,
        drafts: Drafts | None = None,
        watchdog: Watchdog | None = None,
        pass_seconds: float = PASS_SECONDS,
        queues: list[RequestQueue] | None = None,
    ) -> None:
        self._watchdog = watchdog or Watchdog()
        self._model = model
        self._engine = engine
        self._preparer = JobPreparer(model, self._watchdog.step)
        self._queue = RequestQueue(max_tokens, pass_seconds)
        # Those of all runners that share the engine's thread.
        self._queues = [] if queues is None else queues
        self._queues.append(self._queue)
        self._text_thread = ThreadPoolExecutor(1, "text")
        self._corpus_thread = ThreadPoolExecutor(1, "corpus")
        self._engine_thread = engine_thread or ThreadPoolExecutor(1, "engine")
        self._encode_thread = ThreadPoolExecutor(1, "encode")
        # Leases that are being prepared; used on the loop.
        self._preparing: set[LeaseKey] = set()
        self._passes: deque[asyncio.Future[EndedJobs | None]] = deque()
        self._arrived = asyncio.Event()
        self._full_pass_jobs = 0
        self._encoder = ResultEncoder(model, engine.attention, engine.rules)
        self._spans = spans or Spans()
        self._drafts = drafts or Drafts()
        self._vocabulary = Vocabulary(model.tokenizer)
        self.stats = PassStats(seconds=engine.seconds)

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        self._preparing |= {LeaseKey.of(lease) for lease in leases}
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
        jobs, ended = await loop.run_in_executor(thread, self._prepare, leases)
        # Without what was dropped meanwhile.
        jobs = [job for job in jobs if job.key in self._preparing]
        self._preparing -= {LeaseKey.of(lease) for lease in leases}
        if jobs:
            self._queue.add(jobs)
            self._order_passes()
            self._arrived.set()
        return ended

    def full_pass_jobs(self) -> int:
        return self._full_pass_jobs

    def drop(self, keys: set[LeaseKey]) -> None:
        self._preparing -= keys
        self._queue.drop(keys)
        self._drafts.forget(keys)

    def take_back(self) -> list[LeaseKey]:
        keys = [*self._queue.take_back(), *self._preparing]
        self._preparing.clear()
        return keys

    def store_large(self, url: str, above: int, most: int, outputs: Sequence[str] = ()) -> None:
        large = LargeResults(url, above, most, tuple(outputs))
        large.check()
        self._encoder.large = large

    async def next_results(self) -> list[Chunks | FailedAttempt]:
        """Wait for the next pass; see `JobRunner`. Raises `DeviceLostError`."""
        loop = asyncio.get_running_loop()
        while True:
            self._order_passes()
            if not self._passes:
                loop.run_in_executor(self._engine_thread, self._engine.trim)
                self._arrived.clear()
                await self._arrived.wait()
                continue
            ended = await self._passes.popleft()
            # None: what this pass was ordered for went into the one before, or was dropped.
            if ended is not None:
                self._full_pass_jobs = ended.full_pass_jobs
                self._order_passes()
                return await loop.run_in_executor(self._encode_thread, self._encode, ended)

    def _order_passes(self) -> None:
        """Let the engine's thread run a pass, and another after it, if jobs wait."""
        loop = asyncio.get_running_loop()
        while self._queue and len(self._passes) < _PASSES_AHEAD:
            self._passes.append(loop.run_in_executor(self._engine_thread, self._run_pass))

    def _encode(self, ended: EndedJobs) -> list[Chunks | FailedAttempt]:
        leases = [job.lease for job, _ in ended.jobs]
        with self._watchdog.watching("encode", leases) as work:
            return self._encoder.encode(ended, work.step)

    def _prepare(self, leases: Sequence[worker_pb2.Lease]) -> tuple[list[QueuedJob], list[Chunks]]:
        jobs: list[QueuedJob] = []
        ended: list[Chunks] = []
        for lease in leases:
            key = LeaseKey.of(lease)
            if key not in self._preparing:
                continue
            try:
                with self._watchdog.watching("text", [lease]):
                    job = self._preparer.prepare(read_request(lease.spec))
                if not isinstance(job, TokenizedPrompt):
                    self._encoder.check_store(lease)
                    self._encoder.check_size(lease.spec, job)
            except InvalidJob as error:
                ended.append(invalid(lease, error))
            except ResultTooLargeError as error:
                ended.append(too_large(lease, error))
            except Exception as error:
                # A fault of the tokenizer or of ours must not take the worker down.
                log.exception("job.prepare_failed", job=lease.job_id, tenant=lease.tenant)
                ended.append(internal_error(lease, error))
            else:
                if isinstance(job, TokenizedPrompt):
                    ended.append(self._encoder.tokenized(lease, job))
                else:
                    jobs.append(QueuedJob(key, lease, job, queue_order(lease)))
        return jobs, ended

    def _run_pass(self) -> EndedJobs | None:
        """Run the next pass, on the engine's thread; return what has ended with it, if anything."""
        running = self._queue.next_task()
        if running is not None:
            return self._advance(running)
        batch = self._queue.next_batch()
        if not batch:
            return None
        full_pass_jobs = len(batch) if self._queue.has_waiting else 0
        if not isinstance(batch[0].job, TraceJob):
            return self._begin(batch, full_pass_jobs)
        started = time.perf_counter()

        def stop() -> bool:
            spent = time.perf_counter() - started
            return spent > self._queue.pass_seconds and any(self._queues)

        with self._computing(batch, self._queue.limit(batch)):
            self._engine.should_stop = stop
            outcomes = self._trace(batch)
        seconds = time.perf_counter() - started
        ended, others = self._queue.end_pass(batch, outcomes, seconds, self._engine.join)
        done = [*(job for job, _ in ended), *others]
        self._charge(seconds, [(job, _tokens(job, None)) for job in done], self._queue.capacity)
        accounted = self._account(ended, seconds, full_pass_jobs, others)
        return accounted if ended else None

    @contextmanager
    def _computing(self, jobs: Sequence[QueuedJob], limit: float = LIMIT) -> Iterator[Work]:
        leases, tokens = [job.lease for job in jobs], [job.job.total_tokens for job in jobs]
        with self._watchdog.watching("engine", leases, limit, tokens) as work:
            self._engine.on_step = work.step
            yield work

    def _trace(self, batch: Sequence[QueuedJob]) -> list[Outcome]:
        try:
            return self._engine.run([j.job for j in batch if isinstance(j.job, TraceJob)])
        except DeviceLostError:
            raise
        except Exception as error:
            if len(batch) == 1:
                (job,) = batch
                log.exception("pass.failed", job=job.key.job_id, tenant=job.lease.tenant)
                return [_failure(error)]
            # One job must not cost its neighbours their results.
            log.warning("pass.split", jobs=len(batch), exc_info=error)
            return [outcome for job in batch for outcome in self._trace([job])]

    def _begin(self, batch: list[QueuedJob], full_pass_jobs: int) -> EndedJobs | None:
        """Begin a task of many passes, and advance it once."""
        try:
            with self._computing(batch):
                task = self._engine.begin([job.job for job in batch])
        except DeviceLostError:
            raise
        except Exception as error:
            log.warning("task.failed", jobs=len(batch), exc_info=error)
            return self._account([(job, _failure(error)) for job in batch], 0.0, full_pass_jobs)
        running = RunningTask(dict(enumerate(batch)), task, batch[0].job.batch_key, full_pass_jobs)
        self._queue.begin(running)
        return self._advance(running, len(batch) if isinstance(task, Generation) else 0)

    def _advance(self, running: RunningTask, joined: int = 0) -> EndedJobs | None:
        """Advance a task of many passes; return the jobs that have ended, if any.

        None of them where others have joined: they leave room in the worker's queue.
        """
        started = time.perf_counter()
        task = running.task
        work: Mapping[int, int] = {}
        outcomes: Mapping[int, Outcome]
        failed = False
        with self._queue.lock:
            jobs = dict(running.jobs)
        try:
            with self._computing(list(jobs.values())) as watched:
                if isinstance(task, Generation):
                    joined += self._write(running, task, watched)
                else:
                    self._engine.advance(task)
                work, outcomes = task.take_work(), task.take_outcomes()
        except DeviceLostError:
            raise
        except InvalidJob as error:
            failed = True
            outcomes = dict.fromkeys(running.jobs, error)
        except Exception as error:
            failed = True
            log.warning("task.failed", jobs=len(running.jobs), exc_info=error)
            outcomes = dict.fromkeys(list(running.jobs), _failure(error))
        seconds = time.perf_counter() - started
        running.seconds += seconds
        with self._queue.lock:
            jobs |= running.jobs
        self._charge(seconds, [(jobs[index], tokens) for index, tokens in work.items()])
        ended = self._queue.end(running, outcomes, finished=failed or task.finished)
        if not ended and not joined:
            return None
        return self._account(ended, running.seconds, running.full_pass_jobs)

    def _write(self, running: RunningTask, task: Generation, watched: Work) -> int:
        """Generate some tokens of texts, and let others join meanwhile; return how many did."""
        joined = 0

        def let_join() -> None:
            nonlocal joined
            if self._queue.has_waiting and (jobs := self._queue.join(running, task)):
                joined += len(jobs)
                watched.leases = [*watched.leases, *(job.lease for job in jobs)]
                watched.tokens = [*watched.tokens, *(job.job.total_tokens for job in jobs)]

        def on_token() -> None:
            # The lock keeps a text that is dropped and forgotten at this moment from coming back.
            with self._queue.lock:
                for index, job in running.jobs.items():
                    # Somebody reads along with it.
                    if job.lease.spec.generation.stream:
                        self._drafts.note(job.key, task.token_ids(index), self._vocabulary)
            let_join()

        let_join()
        self._queue.go_on(running, self._engine.advance(task, on_token, running.steps))
        return joined

    def _charge(
        self, seconds: float, work: Iterable[tuple[QueuedJob, int]], capacity: int = 0
    ) -> None:
        """Count a pass: the tokens of each job that went through the model, and its tenant's time.

        It had room for `capacity` tokens, or for these: who waits joins a task that has room.
        """
        tenant_tokens: Counter[str] = Counter()
        for job, tokens in work:
            tenant_tokens[job.lease.tenant] += tokens
        tokens = tenant_tokens.total()
        self.stats.charge_tenants(seconds, tenant_tokens)
        self.stats.tokens += tokens
        self.stats.passes += 1
        # A longer prompt is a pass of its own.
        self.stats.capacity += max(tokens, capacity)

    def _account(
        self,
        ended: Sequence[tuple[QueuedJob, Outcome]],
        seconds: float,
        full_pass_jobs: int,
        others: Sequence[QueuedJob] = (),
    ) -> EndedJobs:
        """Account for jobs that have ended with a pass, or with a task that has taken so long.

        `others` were in the pass with some of their targets, and go on in a later one.
        """
        self._drafts.forget(job.key for job, _ in ended)
        tokens = sum(_tokens(job, outcome) for job, outcome in ended)
        tokens += sum(_tokens(job, None) for job in others)
        failed = sum(not isinstance(outcome, JobResult) for _, outcome in ended)
        self.stats.failed += failed
        self.stats.jobs += len(ended) - failed
        for job in [*(job for job, _ in ended), *others]:
            self._spans.record(
                "reltrace.pass",
                job.lease.spec.traceparent,
                seconds - job.joined,
                job=job.key.job_id,
                attempt=job.key.attempt,
                tenant=job.lease.tenant,
                model=self._model.name,
                rule=job.job.rule,
                tokens=job.job.total_tokens,
                jobs_in_pass=len(ended) + len(others),
                tokens_in_pass=tokens,
            )
        log.debug("pass.done", jobs=len(ended), tokens=tokens, seconds=round(seconds, 4))
        return EndedJobs(ended, seconds, full_pass_jobs)


def _failure(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else PassFailedError(str(error))


def _tokens(job: QueuedJob, outcome: Outcome | None) -> int:
    """Return how many tokens went through the model for a job."""
    if not isinstance(job.job, GenerateJob):
        return job.job.rows
    generated = outcome.generated if isinstance(outcome, JobResult) else None
    return len(job.job.token_ids) + (len(generated.token_ids) if generated else 0)
