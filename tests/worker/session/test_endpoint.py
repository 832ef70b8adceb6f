"""Which scheduler a worker goes to, what it presents there, and over what."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from certificates import Certificates, make_certificates
from nameserver import nameserver
from proxy import proxy_to
from reltrace_proto.net import Credentials, TlsOptions, token_from_environment
from reltrace_proto.v1 import worker_pb2, worker_pb2_grpc
from reltrace_worker.session.endpoint import Endpoints
from reltrace_worker.session.session import RefusedError, Session

TOKEN = "rlt_secret"


class Idle:
    """Runs nothing."""

    async def add(self, leases: object) -> list[object]:
        return []

    async def next_results(self) -> list[object]:
        await asyncio.Event().wait()
        return []

    def drop(self, keys: object) -> None:
        pass

    def full_pass_jobs(self) -> int:
        return 0

    def store_large(self, *settings: object) -> None:
        pass

    def take_back(self) -> list[object]:
        return []


class Scheduler(worker_pb2_grpc.WorkerServiceServicer):
    """Welcomes workers that have the token, and keeps them until it is told to let go."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.presented: asyncio.Queue[str] = asyncio.Queue()
        self.let_go = asyncio.Event()
        self.ends_with: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE

    async def Work(self, requests, context) -> AsyncIterator[worker_pb2.WorkResponse]:  # noqa: N802
        presented = dict(context.invocation_metadata()).get("authorization", "")
        if self.token is not None and presented != f"Bearer {self.token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here")
        welcome = worker_pb2.Welcome()
        welcome.heartbeat.seconds = 60
        yield worker_pb2.WorkResponse(welcome=welcome)
        await self.presented.put(presented)
        await self.let_go.wait()
        self.let_go.clear()
        if self.ends_with is not None:
            await context.abort(self.ends_with, "over")
        yield worker_pb2.WorkResponse(reconnect=worker_pb2.Reconnect())
        # Until the worker closes its side.
        async for _ in requests:
            pass

    async def next(self) -> str:
        async with asyncio.timeout(20):
            return await self.presented.get()


@asynccontextmanager
async def serving(
    scheduler: Scheduler,
    credentials: grpc.ServerCredentials | None = None,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(scheduler, server)
    port = (
        server.add_secure_port(address, credentials)
        if credentials
        else server.add_insecure_port(address)
    )
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@asynccontextmanager
async def working(
    address: str, credentials: Credentials | None = None, seed: int = 0
) -> AsyncIterator["asyncio.Task[None]"]:
    session = Session(
        address, worker_pb2.Hello(worker_id="w"), Idle(), credentials=credentials, seed=seed
    )
    task = asyncio.create_task(session.run())
    yield task
    task.cancel()
    with suppress(asyncio.CancelledError, RefusedError):
        await task


@pytest.fixture(autouse=True)
def _no_token_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RELTRACE_TOKEN", raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def test_it_moves_on_when_its_scheduler_goes_and_comes_back() -> None:
    schedulers = [Scheduler(), Scheduler()]
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(serving(scheduler)) for scheduler in schedulers
        ]
        chosen = Endpoints(f"{first},{second}", Credentials(), 0).current
        order = schedulers if chosen == first else schedulers[::-1]
        await stack.enter_async_context(working(f"{first},{second}"))
        for turn in range(4):
            here, there = order[turn % 2], order[(turn + 1) % 2]
            await here.next()
            assert there.presented.empty()
            here.let_go.set()


async def test_it_does_not_wait_before_it_asks_the_other_one() -> None:
    scheduler = Scheduler()
    async with serving(scheduler) as address:
        endpoints = f"127.0.0.1:1,{address}"
        seed = next(
            seed
            for seed in range(100)
            if Endpoints(endpoints, Credentials(), seed).current != address
        )
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def noting(seconds: float) -> None:
            pauses.append(seconds)
            await sleep(seconds)

        async with working(endpoints, seed=seed):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(asyncio, "sleep", noting)
                await scheduler.next()
        # None but the heartbeat's.
        assert [pause for pause in pauses if pause < 60] == []


async def test_it_connects_again_when_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given two schedulers that ask a worker to connect again, as they do with time
    I expect it to be at one of them again without a pause, now the other one, now the same.
    """
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noting(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    schedulers = [Scheduler(), Scheduler()]
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(each)) for each in schedulers]
        endpoints = Endpoints(",".join(addresses), Credentials(), 3)
        await stack.enter_async_context(working(",".join(addresses), seed=3))
        monkeypatch.setattr(asyncio, "sleep", noting)
        visited = []
        for _ in range(8):
            here = schedulers[addresses.index(endpoints.current)]
            await here.next()
            visited.append(here)
            here.ends_with = None
            here.let_go.set()
            endpoints.choose_anew()
    assert [pause for pause in pauses if pause < 60] == []
    moves = [one is not other for one, other in pairwise(visited)]
    assert set(moves) == {True, False}


def test_workers_spread_over_the_schedulers() -> None:
    addresses = ",".join(f"h{number}:1" for number in range(4))
    chosen = [Endpoints(addresses, Credentials(), seed).current for seed in range(200)]
    assert {chosen.count(address) > 25 for address in addresses.split(",")} == {True}
    # One seed, one order; every address has its turn.
    endpoints, again = (Endpoints(addresses, Credentials(), 7) for _ in range(2))
    seen = []
    for _ in range(4):
        assert endpoints.current == again.current
        seen.append(endpoints.current)
        endpoints.move_on()
        again.move_on()
    assert sorted(seen) == addresses.split(",")
    assert endpoints.current == seen[0]


async def test_every_address_behind_a_name_is_one_to_go_to() -> None:
    one, two = Scheduler(), Scheduler()
    async with serving(one) as address:
        port = address.rpartition(":")[2]
        with nameserver(["127.0.0.1", "127.0.0.2"]) as dns:
            async with serving(two, address=f"127.0.0.2:{port}"):
                seen = set()
                async with working(f"dns://{dns}/schedulers.test:{port}"):
                    async with asyncio.timeout(60):
                        while len(seen) < 2:
                            waits = {
                                asyncio.create_task(scheduler.next()): scheduler
                                for scheduler in (one, two)
                            }
                            done, rest = await asyncio.wait(
                                waits, return_when=asyncio.FIRST_COMPLETED
                            )
                            for task in rest:
                                task.cancel()
                            for task in done:
                                seen.add(waits[task])
                                waits[task].let_go.set()


async def test_the_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    scheduler = Scheduler()
    async with serving(scheduler) as address:
        async with working(address):
            assert await scheduler.next() == ""
        monkeypatch.setenv("RELTRACE_TOKEN", "from-variable")
        async with working(address, Credentials(token_from_environment())):
            assert await scheduler.next() == "Bearer from-variable"
        async with working(address, Credentials(file)):
            assert await scheduler.next() == f"Bearer {TOKEN}"


async def test_a_scheduler_that_does_not_know_the_token_ends_the_worker() -> None:
    scheduler = Scheduler()
    scheduler.token = TOKEN
    async with serving(scheduler) as address, working(address) as task:
        with pytest.raises(RefusedError, match="refuses this worker: the token is not known"):
            async with asyncio.timeout(20):
                await task


async def test_a_token_that_was_replaced_meanwhile_is_presented_anew(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    scheduler = Scheduler()
    scheduler.token = "old"
    async with serving(scheduler) as address, working(address, Credentials(file)) as task:
        assert await scheduler.next() == "Bearer old"
        file.write_text("new")
        scheduler.token = "new"
        # The old one is withdrawn, and with it the stream.
        scheduler.ends_with = grpc.StatusCode.UNAUTHENTICATED
        scheduler.let_go.set()
        assert await scheduler.next() == "Bearer new"

        # A file that is away for a moment, and a scheduler too: no reason to give up.
        file.unlink()
        scheduler.ends_with = grpc.StatusCode.UNAVAILABLE
        scheduler.let_go.set()
        await asyncio.sleep(0)
        file.write_text("new")
        assert await scheduler.next() == "Bearer new"
        assert not task.done()


async def test_tls_and_mutual_tls(certificates: Certificates) -> None:
    pair = (certificates.server_key.read_bytes(), certificates.server_cert.read_bytes())
    server = grpc.ssl_server_credentials([pair], certificates.ca.read_bytes(), True)
    mine = TlsOptions(
        certificates.ca, certificates.client_cert, certificates.client_key, certificates.name
    )
    scheduler = Scheduler()
    async with serving(scheduler, server) as address:
        async with working(address, Credentials(tls=mine)):
            await scheduler.next()
        async with working(address, Credentials(tls=TlsOptions(certificates.ca))) as nobody:
            async with working(address, Credentials(tls=mine)):
                await scheduler.next()
            assert scheduler.presented.empty()
            assert not nobody.done()


async def test_a_scheduler_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clients: by the proxy that the environment names, unless the address is excepted."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # A name that only the proxy knows.
    address = "scheduler.test:50051"
    with proxy_to(f"127.0.0.1:{port}") as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy)
        async with Endpoints(address, Credentials()).open_channel() as channel:
            async with asyncio.timeout(20):
                await channel.channel_ready()
        assert set(asked) == {address}
    await server.stop(0)
