"""A worker's session against a scripted scheduler: real gRPC, a real (small) model."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import grpc
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from reference.loaded import Checkpoints
from reltrace_proto import protocol
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from reltrace_worker.engine import Engine
from reltrace_worker.engine.generation import Generation
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.runner import Runner
from reltrace_worker.session.session import RefusedError, Session
from reltrace_worker.session.watchdog import Watchdog
from reltrace_worker.types.errors import PassFailedError
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import Outcome

PROMPT = "I have 5 cats and 3 dogs"


class Scheduler(worker_pb2_grpc.WorkerServiceServicer):
    """Takes connections; a test reads and writes them as it likes."""

    def __init__(self, heartbeat: float = 60.0) -> None:
        self.takes_drafts = True
        self.connections: asyncio.Queue[Connection] = asyncio.Queue()
        self.refuse: grpc.StatusCode | None = None
        self._heartbeat = heartbeat

    async def Work(self, request_iterator, context) -> AsyncIterator[worker_pb2.WorkResponse]:  # noqa: N802
        if self.refuse is not None:
            await context.abort(self.refuse, "not you")
        connection = Connection()
        heartbeat = Duration()
        heartbeat.FromTimedelta(timedelta(seconds=self._heartbeat))
        yield worker_pb2.WorkResponse(
            welcome=worker_pb2.Welcome(heartbeat=heartbeat, drafts=self.takes_drafts)
        )
        await self.connections.put(connection)

        async def receive() -> None:
            async for request in request_iterator:
                await connection.requests.put(request)
            connection.ended.set()
            await connection.responses.put(None)

        receiving = asyncio.create_task(receive())
        try:
            while (response := await connection.responses.get()) is not None:
                if isinstance(response, grpc.StatusCode):
                    await context.abort(response, "cut")
                yield response
        finally:
            receiving.cancel()

    async def next(self) -> "Connection":
        async with asyncio.timeout(20):
            return await self.connections.get()


class Connection:
    """One stream, from the scheduler's side."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[worker_pb2.WorkRequest] = asyncio.Queue()
        self.responses: asyncio.Queue = asyncio.Queue()
        # The worker closed its side.
        self.ended = asyncio.Event()

    async def receive(self, kind: str) -> worker_pb2.WorkRequest:
        """Wait for the next message of a kind, past others."""
        async with asyncio.timeout(20):
            while (request := await self.requests.get()).WhichOneof("message") != kind:
                pass
        return request

    async def lease(self, *specs: types_pb2.JobSpec, first: int = 0, attempt: int = 1) -> None:
        leases = [
            worker_pb2.Lease(job_id=f"s-{number}", attempt=attempt, spec=spec)
            for number, spec in enumerate(specs, first)
        ]
        await self.responses.put(worker_pb2.WorkResponse(leases=worker_pb2.Leases(leases=leases)))

    async def commit(self, number: int) -> None:
        await self.responses.put(worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=number)))

    async def defer(self, number: int, delay: float) -> None:
        deferred = worker_pb2.Deferred(id=number)
        deferred.delay.FromTimedelta(timedelta(seconds=delay))
        await self.responses.put(worker_pb2.WorkResponse(deferred=deferred))

    async def revoke(self, *jobs: str) -> None:
        refs = [worker_pb2.LeaseRef(job_id=job, attempt=1) for job in jobs]
        await self.responses.put(worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs)))

    async def cut(self) -> None:
        """End the stream as if the scheduler had died."""
        await self.responses.put(grpc.StatusCode.UNAVAILABLE)


@pytest.fixture
async def scheduler() -> Scheduler:
    return Scheduler()


@asynccontextmanager
async def serving(scheduler: Scheduler) -> AsyncIterator[str]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def engine(checkpoints: Checkpoints) -> Engine:
    return Engine(checkpoints.loaded("plain"))


@pytest.fixture
async def session(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine
) -> AsyncIterator[Session]:
    """A session that is connected, or about to be."""
    async with serving(scheduler) as address:
        hello = worker_pb2.Hello(worker_id="w", model=types_pb2.ModelInfo(name="m"))
        runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256)
        session = Session(address, hello, runner)
        task = asyncio.create_task(session.run())
        yield session
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def spec(prompt: str = PROMPT, **fields: object) -> types_pb2.JobSpec:
    return types_pb2.JobSpec(prompt=prompt, **fields)


async def test_a_job_from_lease_to_commit(scheduler: Scheduler, session: Session) -> None:
    connection = await scheduler.next()
    assert (await connection.receive("hello")).hello.worker_id == "w"
    room = (await connection.receive("ready")).ready.jobs
    assert room > 1

    await connection.lease(spec(sites=["embed", "resid"]))
    results = (await connection.receive("results")).results
    await connection.commit(results.id)

    (leased,) = results.chunks
    chunk = leased.chunk
    assert (chunk.job_id, leased.attempt, chunk.number) == ("s-0", 1, 1)
    assert chunk.end.state == types_pb2.JOB_STATE_SUCCEEDED
    assert [piece.site for piece in chunk.tensors] == ["embed", "resid"]
    assert chunk.header.provenance.rule == "attnlrp"
    # The place is free again only once the result is stored.
    assert (await connection.receive("ready")).ready.jobs == 1


async def test_heartbeats_name_what_is_held(
    checkpoints: Checkpoints, engine: Engine, scheduler: Scheduler
) -> None:
    scheduler._heartbeat = 0.05
    async with serving(scheduler) as address:
        hello = worker_pb2.Hello(worker_id="w")
        runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256)
        task = asyncio.create_task(Session(address, hello, runner).run())
        connection = await scheduler.next()
        with engine._lock:  # the pass waits here
            await connection.lease(spec(), spec())
            while True:
                leases = (await connection.receive("heartbeat")).heartbeat.leases
                if leases:
                    break
        assert {(lease.job_id, lease.attempt) for lease in leases} == {("s-0", 1), ("s-1", 1)}
        # A beat that comes after the result must not ask for a lease that ended with it.
        uploaded = 0
        while uploaded < 2:
            uploaded += len((await connection.receive("results")).results.chunks)
        assert not (await connection.receive("heartbeat")).heartbeat.leases
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_results_are_sent_again_to_the_next_connection(
    scheduler: Scheduler, session: Session
) -> None:
    first = await scheduler.next()
    await first.lease(spec(), spec())
    sent = [(await first.receive("results")).results]
    while sum(len(message.chunks) for message in sent) < 2:
        sent.append((await first.receive("results")).results)
    await first.cut()

    second = await scheduler.next()
    assert (await second.receive("hello")).hello.worker_id == "w"
    held = (await second.receive("heartbeat")).heartbeat.leases
    assert {lease.job_id for lease in held} == {"s-0", "s-1"}
    for message in sent:
        assert (await second.receive("results")).results == message
        await second.commit(message.id)
    assert sum([(await second.receive("ready")).ready.jobs for _ in range(2)]) > 0


async def test_a_revoked_job_is_dropped(scheduler: Scheduler, session: Session, engine) -> None:
    connection = await scheduler.next()
    with engine._lock:  # the pass waits here
        await connection.lease(spec(), first=0)
        await connection.lease(spec("other"), first=1)
        await connection.revoke("s-0")
        await connection.receive("ready")
        assert (await connection.receive("ready")).ready.jobs == 1
    results = (await connection.receive("results")).results
    assert [leased.chunk.job_id for leased in results.chunks] == ["s-1"]


BAD = {
    "prompt": spec("x " * 500),
    "targets[0].token": spec(targets=[types_pb2.Target(token=types_pb2.TokenRef(text="a b c"))]),
    "sites[0]": spec(sites=["nowhere"]),
}


@pytest.mark.parametrize("field", BAD)
async def test_an_invalid_job_fails_alone(
    scheduler: Scheduler, session: Session, field: str
) -> None:
    connection = await scheduler.next()
    await connection.lease(spec(), BAD[field], spec())
    ends: dict[str, types_pb2.JobEnd] = {}
    while len(ends) < 3:
        results = (await connection.receive("results")).results
        ends |= {leased.chunk.job_id: leased.chunk.end for leased in results.chunks}
    assert ends["s-0"].state == ends["s-2"].state == types_pb2.JOB_STATE_SUCCEEDED
    failed = ends["s-1"]
    assert failed.state == types_pb2.JOB_STATE_FAILED
    assert grpc.StatusCode.INVALID_ARGUMENT.value[0] == failed.error.code
    assert [violation.field for violation in failed.error.violations] == [field]


async def test_a_pass_that_breaks_costs_only_the_job_that_breaks_it(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def breaks(batch):
        if any(job.sites == ("mlp_out",) for job in batch):
            raise MemoryError("no room")
        return run(batch)

    monkeypatch.setattr(engine, "run", breaks)
    connection = await scheduler.next()
    await connection.lease(spec("cats"), spec(sites=["mlp_out"]), spec("dogs"))
    release = (await connection.receive("release")).release
    assert [ref.job_id for ref in release.leases] == ["s-1"]
    assert release.error.message == "no room"
    ends: dict[str, types_pb2.JobEnd] = {}
    while len(ends) < 2:
        results = (await connection.receive("results")).results
        ends |= {leased.chunk.job_id: leased.chunk.end for leased in results.chunks}
    assert ends["s-0"].state == ends["s-2"].state == types_pb2.JOB_STATE_SUCCEEDED


async def test_a_large_result_comes_in_order(scheduler: Scheduler, session: Session) -> None:
    connection = await scheduler.next()
    ids = types_pb2.TokenIds(ids=[i % 200 + 20 for i in range(128)])
    targets = [types_pb2.Target(token=types_pb2.TokenRef(id=i)) for i in range(40)]
    job = types_pb2.JobSpec(input_ids=ids, sites=["neuron"], reduction="full", targets=targets)
    await connection.lease(job)
    numbers: list[int] = []
    while True:
        results = (await connection.receive("results")).results
        numbers += [leased.chunk.number for leased in results.chunks]
        await connection.commit(results.id)
        if results.chunks[-1].chunk.HasField("end"):
            break
    assert len(numbers) > 2
    assert numbers == list(range(1, len(numbers) + 1))


def begun(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that is set when the engine is asked for a pass."""
    asked, run = threading.Event(), engine.run

    def noted(batch: Sequence[TraceJob]) -> list[Outcome]:
        asked.set()
        return run(batch)

    monkeypatch.setattr(engine, "run", noted)
    return asked


async def test_draining_hands_back_what_has_not_begun(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, asked = await scheduler.next(), begun(engine, monkeypatch)
    with engine._lock:  # the first pass waits here
        await connection.lease(types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=[20] * 128)))
        assert await asyncio.to_thread(asked.wait, 20)
        await connection.lease(spec(), spec(), first=1)
        while len(session._runner._queue._waiting) < 2:
            await asyncio.sleep(0.005)
        draining = asyncio.create_task(session.drain(20))
        released = (await connection.receive("release")).release.leases
        assert {lease.job_id for lease in released} == {"s-1", "s-2"}
        await connection.lease(spec(), first=9)
        late = (await connection.receive("release")).release.leases
        assert [lease.job_id for lease in late] == ["s-9"]
    results = (await connection.receive("results")).results
    assert [leased.chunk.job_id for leased in results.chunks] == ["s-0"]
    assert not draining.done()
    await connection.commit(results.id)
    async with asyncio.timeout(10):
        await draining


async def test_a_pass_that_hangs_is_renewed_no_more_and_not_handed_back(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a pass that hangs, and a job that waits for it
    If the worker leaves
    I expect the job that waits handed back, no lease named in a heartbeat any more, and the stream
    closed without a farewell, after which every lease would be queued again as if nothing was lost.
    """
    scheduler._heartbeat = 0.05
    connection, asked = await scheduler.next(), begun(engine, monkeypatch)
    with engine._lock:  # the pass hangs here
        await connection.lease(spec())
        assert await asyncio.to_thread(asked.wait, 20)
        await connection.lease(spec(), first=1)
        while not session._runner._queue._waiting:
            await asyncio.sleep(0.005)
        async with asyncio.timeout(10):
            await session.drain(10, {LeaseKey("s-0", 1)})
        released = (await connection.receive("release")).release.leases
        assert [lease.job_id for lease in released] == ["s-1"]
        async with asyncio.timeout(10):
            await connection.ended.wait()
        rest = [connection.requests.get_nowait() for _ in range(connection.requests.qsize())]
        assert not [one for one in rest if one.WhichOneof("message") != "heartbeat"]
        assert not [one for one in rest if one.heartbeat.leases]


async def test_heartbeats_tell_the_progress_of_the_pass(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler._heartbeat = 0.05
    monkeypatch.setattr("reltrace_worker.session.watchdog._PERIOD", 0.05)
    watchdog = Watchdog()
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256, watchdog=watchdog)
    async with serving(scheduler) as address:
        session = Session(address, worker_pb2.Hello(worker_id="w"), runner, watchdog=watchdog)
        tasks = [asyncio.create_task(work()) for work in (session.run, watchdog.stuck)]
        connection = await scheduler.next()
        beat = (await connection.receive("heartbeat")).heartbeat
        assert not beat.HasField("progress")
        with engine._lock:  # the pass waits here
            await connection.lease(spec())
            while not beat.progress.silent.ToMilliseconds() >= 200:
                beat = (await connection.receive("heartbeat")).heartbeat
            assert beat.progress.limit.seconds == 600
        await connection.receive("results")
        while beat.HasField("progress"):
            beat = (await connection.receive("heartbeat")).heartbeat
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_a_drained_worker_waits_for_a_scheduler_that_is_away(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a worker that drains while its pass runs, and a scheduler that goes away meanwhile
    I expect the result at the connection after it, no offer of room, and a farewell there.
    """
    connection, asked = await scheduler.next(), begun(engine, monkeypatch)
    with engine._lock:  # the pass waits here
        await connection.lease(spec())
        assert await asyncio.to_thread(asked.wait, 20)
        draining = asyncio.create_task(session.drain(20))
        await connection.cut()
        connection = await scheduler.next()
        beat = (await connection.receive("heartbeat")).heartbeat
        assert [lease.job_id for lease in beat.leases] == ["s-0"]
    results = (await connection.requests.get()).results
    assert [leased.chunk.job_id for leased in results.chunks] == ["s-0"]
    await connection.cut()
    connection = await scheduler.next()
    await connection.receive("heartbeat")
    again = (await connection.requests.get()).results
    assert again == results
    await connection.commit(again.id)
    async with asyncio.timeout(10):
        await draining
        await connection.receive("leave")


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION]
)
async def test_a_scheduler_that_refuses_ends_the_worker(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine, code: grpc.StatusCode
) -> None:
    scheduler.refuse = code
    async with serving(scheduler) as address:
        runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256)
        with pytest.raises(RefusedError, match="not you"):
            async with asyncio.timeout(20):
                await Session(address, worker_pb2.Hello(), runner).run()


async def test_a_scheduler_of_an_older_protocol_ends_the_worker(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(scheduler) as address:
        runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256)
        working = asyncio.create_task(Session(address, worker_pb2.Hello(), runner).run())
        # One from before there were versions is served.
        hello = (await (await scheduler.next()).receive("hello")).hello
        assert hello.protocol == protocol.PROTOCOL
        working.cancel()
        monkeypatch.setattr(protocol, "OLDEST_PROTOCOL", 1)
        with pytest.raises(RefusedError, match=f"{address}: the scheduler speaks version 0 of"):
            async with asyncio.timeout(20):
                await Session(address, worker_pb2.Hello(), runner).run()


async def test_a_failed_attempt_is_handed_back_with_its_reason(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a pass that breaks off for one of two jobs, not for what the job asks
    I expect its lease handed back with the reason, room for another, and the other's result.
    """
    run = engine.run

    def broken(batch: list) -> object:
        if any(job.token_ids[:2] == broken_ids[:2] for job in batch):
            raise PassFailedError("a broken kernel")
        return run(batch)

    broken_ids = (20, 21, 22)
    monkeypatch.setattr(engine, "run", broken)
    connection = await scheduler.next()
    await connection.receive("ready")
    bad = types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=broken_ids))
    await connection.lease(bad, spec())

    assert (await connection.receive("ready")).ready.jobs == 1
    release = (await connection.receive("release")).release
    assert [ref.job_id for ref in release.leases] == ["s-0"]
    assert (release.error.code, release.error.message) == (13, "a broken kernel")
    (leased,) = (await connection.receive("results")).results.chunks
    assert leased.chunk.job_id == "s-1"


async def test_a_lost_device_is_seen_by_the_watchdog(
    checkpoints: Checkpoints, scheduler: Scheduler, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a pass that loses the device
    I expect the session to stay until whoever waits for the watchdog drains it: the lease of the
    pass is neither stored nor handed back.
    """

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "_run_batch", lost)
    async with serving(scheduler) as address:
        hello = worker_pb2.Hello(worker_id="w", model=types_pb2.ModelInfo(name="m"))
        watchdog = Watchdog()
        runner = Runner(checkpoints.loaded("plain"), engine, 256, watchdog=watchdog)
        session = Session(address, hello, runner, watchdog=watchdog)
        working = asyncio.create_task(session.run())
        connection = await scheduler.next()
        await connection.lease(spec(), spec())
        async with asyncio.timeout(20):
            lost = await watchdog.stuck()
            assert {lease.job_id for lease in lost.leases} <= {"s-0", "s-1"}
            assert lost.leases
            assert not working.done()
            await session.drain(1.0, {LeaseKey.of(lease) for lease in lost.leases})
            await working


@asynccontextmanager
async def drafting(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine
) -> AsyncIterator[None]:
    """A session whose texts can be read along with."""
    drafts = Drafts()
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=256, drafts=drafts)
    hello = worker_pb2.Hello(worker_id="w", model=types_pb2.ModelInfo(name="m"))
    async with serving(scheduler) as address:
        task = asyncio.create_task(Session(address, hello, runner, drafts=drafts).run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def text(tokens: int, *, stream: bool) -> types_pb2.JobSpec:
    return spec(generation=types_pb2.Generation(max_new_tokens=tokens, stream=stream))


async def test_texts_that_stream_are_told_while_they_are_written(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine
) -> None:
    """
    Given a text that somebody reads along with, and one that nobody does
    I expect drafts of the first alone, the first of them before its result, each token once.
    """
    async with drafting(scheduler, checkpoints, engine):
        connection = await scheduler.next()
        await connection.receive("hello")
        await connection.lease(text(40, stream=True), text(40, stream=False))
        ids: list[int] = []
        async with asyncio.timeout(20):
            while (request := await connection.requests.get()).WhichOneof("message") != "results":
                for draft in request.drafts.drafts:
                    assert (draft.job_id, draft.attempt, draft.first) == ("s-0", 1, len(ids))
                    ids += draft.token_ids
        written = {leased.chunk.job_id: leased.chunk.generated for leased in request.results.chunks}
        assert len(written) == 2
        assert ids
        assert ids == list(written["s-0"].token_ids)[: len(ids)]


async def test_a_text_begins_again_on_the_next_connection(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a text in the middle, of which drafts may be lost with the connection
    I expect all of it so far to be the first draft of the next connection, and then what follows.
    """
    go_on, advance = threading.Event(), engine.advance

    def four_tokens(task: Generation, on_token: Callable[[], None], _: int) -> int:
        steps = advance(task, on_token, steps=4)
        go_on.wait(20)
        return steps

    monkeypatch.setattr(engine, "advance", four_tokens)
    async with drafting(scheduler, checkpoints, engine):
        first = await scheduler.next()
        await first.lease(text(40, stream=True))
        (draft,) = (await first.receive("drafts")).drafts.drafts
        assert draft.first == 0
        await first.cut()
        second = await scheduler.next()
        (again,) = (await second.receive("drafts")).drafts.drafts
        assert again.first == 0
        ids = list(again.token_ids)
        assert ids[: len(draft.token_ids)] == list(draft.token_ids)
        assert len(ids) <= 4
        go_on.set()
        async with asyncio.timeout(20):
            while (request := await second.requests.get()).WhichOneof("message") != "results":
                for draft in request.drafts.drafts:
                    assert draft.first == len(ids)
                    ids += draft.token_ids
        (leased,) = request.results.chunks
        assert ids == list(leased.chunk.generated.token_ids)[: len(ids)]


async def test_a_scheduler_that_knows_no_drafts_gets_none(
    scheduler: Scheduler, checkpoints: Checkpoints, engine: Engine
) -> None:
    """It would end the stream, with everybody's leases on it."""
    scheduler.takes_drafts = False
    async with drafting(scheduler, checkpoints, engine):
        connection = await scheduler.next()
        await connection.lease(text(40, stream=True))
        kinds = []
        async with asyncio.timeout(20):
            while "results" not in kinds:
                kinds.append((await connection.requests.get()).WhichOneof("message"))
        assert "drafts" not in kinds


@pytest.mark.parametrize("scheduler", [Scheduler(heartbeat=0.1)], ids=["beats"])
async def test_deferred_results_are_kept_and_sent_again(
    scheduler: Scheduler, session: Session
) -> None:
    """
    Given a scheduler that has no room for results
    I expect the worker to keep their leases alive over the same connection, to send the first of
    them after the delay, and what came after it only when there is room.
    """
    connection = await scheduler.next()
    await connection.lease(spec(), first=0)
    first = (await connection.receive("results")).results
    await connection.defer(first.id, 0.3)
    # These end while there is no room.
    await connection.lease(spec("one"), first=1)
    await connection.lease(spec("two"), first=2)
    held: set[str] = set()
    again = None
    async with asyncio.timeout(20):
        while again is None or held != {"s-0", "s-1", "s-2"}:
            request = await connection.requests.get()
            if request.HasField("results"):
                assert request.results == first
                again = request.results
                await connection.defer(again.id, 0.1)
            elif request.HasField("heartbeat"):
                held = {lease.job_id for lease in request.heartbeat.leases}
    await connection.receive("results")
    await connection.commit(first.id)
    jobs: set[str] = set()
    while jobs != {"s-1", "s-2"}:
        message = (await connection.receive("results")).results
        jobs |= {leased.chunk.job_id for leased in message.chunks}
        await connection.commit(message.id)
    async with asyncio.timeout(20):
        while (await connection.receive("heartbeat")).heartbeat.leases:
            pass
    assert scheduler.connections.empty()


async def test_others_are_leased_while_texts_are_generated(
    scheduler: Scheduler, session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a worker that has leased as many texts as it asks for at a time
    If they are being generated
    I expect it to ask for more, and a short text that comes then to end before them.
    """
    turns, go_on, advance = 0, threading.Event(), engine.advance

    def held(task: Generation, on_token: Callable[[], None], steps: int) -> int:
        nonlocal turns
        turns += 1
        assert turns == 1 or go_on.wait(20)
        return advance(task, on_token, steps)

    monkeypatch.setattr(engine, "advance", held)
    connection = await scheduler.next()
    await connection.receive("ready")
    # As after passes that were full with one job.
    session._window.size = 2
    session._window.reset_offers()
    text = types_pb2.JobSpec(prompt=PROMPT, generation=types_pb2.Generation(max_new_tokens=100))
    await connection.lease(text, text)
    async with asyncio.timeout(20):
        kinds = [(await connection.requests.get()).WhichOneof("message")]
    assert kinds == ["ready"]
    text.generation.max_new_tokens = 1
    await connection.lease(text, first=2)
    async with asyncio.timeout(20):
        while not session._runner._queue.has_waiting:
            await asyncio.sleep(0.01)
    go_on.set()
    results = (await connection.receive("results")).results
    assert results.chunks[0].chunk.job_id == "s-2"
