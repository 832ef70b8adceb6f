import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from reltrace_proto.protocol import PROTOCOL
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

MODEL = types_pb2.ModelInfo(
    name="m",
    vocab_size=100,
    context_length=8,
    sites=["embed", "resid"],
    rules=["attnlrp"],
    reductions=["token"],
    capabilities=[
        "edits",
        "edits.mean",
        "forward_only",
        "generation",
        "generation.stream",
        "corpus",
        "chat",
        "add_special_tokens",
        "tokenize_only",
        "corpus.positions",
    ],
)


@dataclass
class FakeWorker:
    """Speaks the worker's side of the wire; runs nothing."""

    channel: grpc.aio.Channel
    worker_id: str = "w1"
    model: types_pb2.ModelInfo = field(default_factory=lambda: MODEL)
    metadata: tuple[tuple[str, str], ...] = ()
    protocol: int = PROTOCOL

    async def greet(self) -> worker_pb2.Welcome:
        self.call = worker_pb2_grpc.WorkerServiceStub(self.channel).Work(metadata=self.metadata)
        hello = worker_pb2.Hello(worker_id=self.worker_id, model=self.model, protocol=self.protocol)
        await self.send(hello=hello)
        return (await self.receive("welcome")).welcome

    async def connect(self, holding: Sequence[worker_pb2.Lease] = ()) -> worker_pb2.Welcome:
        """Greet, and say what it holds: until then, nothing is leased to it."""
        welcome = await self.greet()
        refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in holding]
        await self.send(heartbeat=worker_pb2.Heartbeat(leases=refs))
        return welcome

    async def send(self, **message: object) -> None:
        await self.call.write(worker_pb2.WorkRequest(**message))

    async def receive(self, kind: str) -> worker_pb2.WorkResponse:
        async with asyncio.timeout(10):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, await self.call.details()
        assert response.WhichOneof("message") == kind
        return response

    async def lease(self, jobs: int) -> list[worker_pb2.Lease]:
        """Ask for jobs until so many are leased."""
        await self.send(ready=worker_pb2.Ready(jobs=jobs))
        leased: list[worker_pb2.Lease] = []
        enough = asyncio.Event()
        talking = asyncio.create_task(self._talk_until(enough))
        try:
            while len(leased) < jobs:
                leased += (await self.receive("leases")).leases.leases
        finally:
            enough.set()
            await talking
        return leased

    async def _talk_until(self, enough: asyncio.Event) -> None:
        """Be heard, without a word on leases: to who is silent, nothing is leased."""
        while True:
            try:
                async with asyncio.timeout(0.1):
                    await enough.wait()
            except TimeoutError:
                await self.send(ready=worker_pb2.Ready(jobs=0))
            else:
                return

    async def finish(
        self, leases: list[worker_pb2.Lease], data: bytes = b"", number: int = 1, message: int = 7
    ) -> None:
        """End jobs with one chunk each."""
        await self.send(
            results=worker_pb2.Results(
                id=message,
                chunks=[ended(lease.job_id, lease.attempt, data, number) for lease in leases],
            )
        )


def ended(job_id: str, attempt: int, data: bytes = b"", number: int = 1) -> worker_pb2.LeasedChunk:
    return worker_pb2.LeasedChunk(
        attempt=attempt,
        chunk=types_pb2.ResultChunk(
            job_id=job_id,
            number=number,
            tensors=[types_pb2.TensorPiece(site="resid", data=data)],
            end=types_pb2.JobEnd(state=types_pb2.JOB_STATE_SUCCEEDED, attempt=attempt),
        ),
    )
