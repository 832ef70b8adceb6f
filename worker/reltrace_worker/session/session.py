"""Holds a worker's leases over any number of connections to its scheduler."""

import asyncio
import contextlib
import time
from collections.abc import Collection

import grpc
import structlog
from reltrace_proto.net import Credentials, Metadata
from reltrace_proto.protocol import PROTOCOL, protocol_fault
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.endpoint import Endpoints
from reltrace_worker.session.leases import (
    Chunks,
    FailedAttempt,
    JobRunner,
    LeaseKey,
    LeaseWindow,
)
from reltrace_worker.session.messages import (
    Outgoing,
    heartbeat,
    pack_results,
    release,
    requests,
)
from reltrace_worker.session.uploads import Uploads
from reltrace_worker.session.watchdog import Watchdog
from reltrace_worker.types.errors import DeviceLostError, WorkerError

log = structlog.get_logger()

_DRAFT_SECONDS = 0.03
"""Seconds between messages of drafts: faster than people read, and at most 33 a second."""

_FIRST_BACKOFF, _LAST_BACKOFF = 0.1, 5.0
_WELCOME_DEADLINE = 10.0
_RECONNECT_DEADLINE = 10.0
"""Seconds for the last answers of a scheduler that wants this worker to connect again."""

_INTERNAL: int = grpc.StatusCode.INTERNAL.value[0]

# Connecting again with the same greeting would be refused again.
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    # Its protocol is too old.
    grpc.StatusCode.FAILED_PRECONDITION,
}


class RefusedError(WorkerError):
    """The scheduler does not take this worker, or the worker not the scheduler."""


class Session:
    """Pulls jobs, keeps their leases alive, and uploads results until they are stored.

    Leases and results outlive a connection: when the scheduler goes away the pass goes
    on, and its results are sent to the scheduler that comes back, under the same lease.

    `address` is the ``HOST:PORT`` of the scheduler, or of several with commas between: one of
    them, chosen by `seed`, and the next when that one is away. Raises `SettingError` where it can
    not be used, or not with this token.
    """

    def __init__(
        self,
        address: str,
        hello: worker_pb2.Hello,
        runner: JobRunner,
        *,
        credentials: Credentials | None = None,
        seed: int | None = None,
        spans: Spans | None = None,
        drafts: Drafts | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._drafts = drafts or Drafts()
        self._watchdog = watchdog or Watchdog()
        self._takes_drafts = False
        self._credentials = credentials or Credentials()
        self._endpoints = Endpoints(address, self._credentials, seed)
        # Addresses that failed since a scheduler last welcomed us.
        self._failed_in_a_row = 0
        self._hello = hello
        hello.protocol = PROTOCOL
        self._runner = runner
        self._spans = spans or Spans()
        # Spans of jobs that are traced, and since when they are held.
        self._traced: dict[LeaseKey, tuple[str, float]] = {}
        self._held: set[LeaseKey] = set()
        self._window = LeaseWindow()
        # None while there is no connection. What is in it is bounded by the protocol:
        # results by `Uploads`, everything else is a few bytes per message.
        self._outgoing: Outgoing | None = None
        self._backoff = _FIRST_BACKOFF
        self._longest_backoff = _LAST_BACKOFF
        # Taken from at once, so that it stays short.
        self._arrived: asyncio.Queue[list[worker_pb2.Lease]] = asyncio.Queue()
        self._finished: asyncio.Queue[list[Chunks]] = asyncio.Queue(2)
        self._uploads = Uploads(self._send)
        self._draining = False
        # Drained: all that is left to do is to say so.
        self._leaving = False
        self._takes_leave = True
        # Set when the scheduler wants this worker gone: whoever runs it calls `drain`.
        self.asked_to_drain = asyncio.Event()
        self._asked_to_reconnect = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Work until cancelled, or drained. Raises `RefusedError`."""
        tasks = [
            asyncio.create_task(work())
            for work in (
                self._prepare,
                self._compute,
                self._upload,
                self._draft,
                self._stay_connected,
            )
        ]
        try:
            # Only a failure ends one of them, or the end of a drained connection.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, grace: float, hung: Collection[LeaseKey] = ()) -> None:
        """Hand back what has not begun, store what has begun, and leave; `run` then ends.

        What is not stored after `grace` seconds is handed back too. A scheduler that is away
        meanwhile is waited for. What is `hung` is neither stored nor handed back: its leases run
        out, so that a job that hangs every worker is quarantined.
        """
        self._draining = True
        self._takes_leave = not hung
        self._drop(self._held.intersection(hung))
        self._release(set(self._runner.take_back()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        self._release(set(self._held))
        self._leaving = True
        if self._outgoing is not None:
            self._leave(self._outgoing)

    def _leave(self, outgoing: Outgoing) -> None:
        """Close our side of the stream, after the word that all leases may be queued again."""
        if self._takes_leave:
            outgoing.put_nowait(worker_pb2.WorkRequest(leave=worker_pb2.Leave()))
        outgoing.put_nowait(None)

    async def _prepare(self) -> None:
        # Concurrently: a corpus takes its time, and jobs after it do not wait. The lease window
        # bounds how many there are; those that were revoked meanwhile end at once.
        async with asyncio.TaskGroup() as preparing:
            while True:
                preparing.create_task(self._add(await self._arrived.get()))

    async def _add(self, leases: list[worker_pb2.Lease]) -> None:
        without_pass = await self._runner.add(leases)
        if self._draining:
            self._release(set(self._runner.take_back()))
        if without_pass:
            await self._finished.put(without_pass)

    async def _compute(self) -> None:
        while True:
            try:
                results = await self._runner.next_results()
            except DeviceLostError:
                # The watchdog knows of it, and whoever waits for it drains us.
                await asyncio.get_running_loop().create_future()
            self._window.adapt(self._runner.full_pass_jobs())
            if not results:
                self._offer()
            failed = [result for result in results if isinstance(result, FailedAttempt)]
            for attempt in failed:
                self._drop({attempt.key})
                error = types_pb2.JobError(code=_INTERNAL, message=attempt.reason)
                self._send(release({attempt.key}, error))
            if len(failed) < len(results):
                await self._finished.put(
                    [result for result in results if not isinstance(result, FailedAttempt)]
                )

    def _accept(self, leases: list[worker_pb2.Lease]) -> None:
        keys = {LeaseKey.of(lease) for lease in leases}
        if self._draining:
            self._send(release(keys))
            return
        self._held |= keys
        for lease in leases:
            if lease.spec.traceparent:
                key = LeaseKey.of(lease)
                self._traced[key] = (lease.spec.traceparent, time.monotonic())
        self._window.add_leased(len(keys))
        self._idle.clear()
        self._arrived.put_nowait(leases)

    def _drop(self, keys: set[LeaseKey]) -> None:
        """Forget leases, and tell the scheduler that there is room for others."""
        self._held -= keys
        for key in self._traced.keys() & keys:
            parent, since = self._traced.pop(key)
            self._spans.record(
                "reltrace.lease",
                parent,
                time.monotonic() - since,
                job=key.job_id,
                attempt=key.attempt,
                worker=self._hello.worker_id,
            )
        if not self._held:
            self._idle.set()
        self._offer()

    def _offer(self) -> None:
        if self._outgoing is None or self._draining:
            return
        if jobs := self._window.offer(len(self._held)):
            self._send(worker_pb2.WorkRequest(ready=worker_pb2.Ready(jobs=jobs)))

    def _release(self, keys: set[LeaseKey]) -> None:
        if keys:
            self._drop(keys)
            self._send(release(keys))

    async def _upload(self) -> None:
        while True:
            results = await self._finished.get()
            for request in pack_results(results, self._held):
                await self._uploads.add(request)

    async def _draft(self) -> None:
        while True:
            drafts = [
                draft for draft in await self._drafts.next() if LeaseKey.of(draft) in self._held
            ]
            if drafts and self._takes_drafts:
                self._send(worker_pb2.WorkRequest(drafts=worker_pb2.Drafts(drafts=drafts)))
            # What is generated meanwhile goes into one message.
            await asyncio.sleep(_DRAFT_SECONDS)

    def _send(self, request: worker_pb2.WorkRequest) -> None:
        """Send, if connected; a new connection starts from what is held and uncommitted."""
        if self._outgoing is not None:
            self._outgoing.put_nowait(request)

    async def _stay_connected(self) -> None:
        while True:
            address = self._endpoints.current
            try:
                await self._connect()
                if self._asked_to_reconnect:
                    self._endpoints.choose_anew()
                    continue
                if self._leaving:
                    return
            except grpc.aio.AioRpcError as error:
                log.warning("scheduler.away", address=address, error=error.details())
            except TimeoutError:
                log.warning("scheduler.silent", address=address)
            finally:
                self._outgoing = None
            self._endpoints.move_on()
            self._failed_in_a_row += 1
            if self._failed_in_a_row < len(self._endpoints):
                # Another one may be there at once.
                continue
            await asyncio.sleep(self._backoff)
            self._backoff = min(2 * self._backoff, self._longest_backoff)

    async def _connect(self) -> None:
        """Hold one connection to the current address until it ends."""
        metadata = self._credentials.metadata()
        try:
            async with self._endpoints.open_channel() as channel:
                await self._connection(worker_pb2_grpc.WorkerServiceStub(channel), metadata)
        except grpc.aio.AioRpcError as error:
            # A token that was replaced while we were connected is no reason to leave.
            outdated = (
                error.code() is grpc.StatusCode.UNAUTHENTICATED
                and metadata != self._credentials.metadata()
            )
            if error.code() not in _REFUSALS or outdated:
                raise
            raise RefusedError(
                f"the scheduler at {self._endpoints.current} refuses this worker: {error.details()}"
            ) from error

    async def _connection(
        self, stub: "worker_pb2_grpc.WorkerServiceAsyncStub", metadata: Metadata
    ) -> None:
        """Greet the scheduler, and handle its messages until the stream ends."""
        outgoing: Outgoing = asyncio.Queue()
        self._asked_to_reconnect = False
        call = stub.Work(requests(outgoing), metadata=metadata)
        try:
            outgoing.put_nowait(worker_pb2.WorkRequest(hello=self._hello))
            async with asyncio.timeout(_WELCOME_DEADLINE):
                welcome = await call.read()
            # A stream that ends with a status raises it instead.
            if not isinstance(welcome, worker_pb2.WorkResponse):
                return
            if fault := protocol_fault("the scheduler", welcome.welcome.protocol):
                raise RefusedError(f"{self._endpoints.current}: {fault}")
            log.info("scheduler.connected", address=self._endpoints.current)
            self._backoff = _FIRST_BACKOFF
            self._failed_in_a_row = 0
            self._takes_drafts = welcome.welcome.drafts
            # Nothing is leased before the heartbeat that follows.
            self._runner.store_large(
                welcome.welcome.results_url,
                welcome.welcome.results_above_bytes,
                welcome.welcome.max_result_bytes,
                welcome.welcome.output_uri,
            )
            self._resume(outgoing)
            period = welcome.welcome.heartbeat.ToTimedelta().total_seconds()
            # Whoever is away for longer than the scheduler may lose its leases over it.
            self._longest_backoff = min(_LAST_BACKOFF, max(period, _FIRST_BACKOFF))
            heartbeats = asyncio.create_task(self._heartbeat(outgoing, period))
            try:
                async with asyncio.timeout(None) as ending:
                    while isinstance(response := await call.read(), worker_pb2.WorkResponse):
                        self._handle(response)
                        if response.HasField("reconnect"):
                            deadline = asyncio.get_running_loop().time() + _RECONNECT_DEADLINE
                            ending.reschedule(deadline)
            finally:
                heartbeats.cancel()
        finally:
            call.cancel()

    def _resume(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        # Leases that ran out meanwhile come back as revoked.
        self._send(heartbeat(self._held, self._watchdog.slowest()))
        self._uploads.send_all()
        # A reader that misses one draft could make nothing of those that follow.
        self._drafts.restart()
        if self._leaving:
            self._leave(outgoing)
        self._window.reset_offers()
        self._offer()

    async def _heartbeat(self, outgoing: Outgoing, period: float) -> None:
        while True:
            await asyncio.sleep(period)
            # A lease whose last result was sent is over once the scheduler reads this heartbeat.
            leases = self._held - self._uploads.over()
            outgoing.put_nowait(heartbeat(leases, self._watchdog.slowest()))

    def _handle(self, response: worker_pb2.WorkResponse) -> None:
        match response.WhichOneof("message"):
            case "leases":
                self._accept(list(response.leases.leases))
            case "committed":
                if over := self._uploads.committed(response.committed.id):
                    self._drop(over)
            case "deferred":
                deferred = response.deferred
                self._uploads.defer(deferred.id, deferred.delay.ToTimedelta().total_seconds())
            case "revoked":
                keys = {LeaseKey.of(ref) for ref in response.revoked.leases}
                log.warning("leases.revoked", jobs=len(keys))
                self._runner.drop(keys)
                self._drop(keys)
            case "drain":
                log.info("drain.wanted")
                self.asked_to_drain.set()
            case "reconnect":
                self._asked_to_reconnect = True
                if self._outgoing is not None:
                    self._outgoing.put_nowait(None)
                    # What comes to be sent is sent over the next connection.
                    self._outgoing = None
