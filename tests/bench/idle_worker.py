"""A worker whose engine does nothing: the real session, a runner that answers at once.

It serves several models, each over a session of its own, which differ in what a job gives:
`tiny` one small chunk; `chunk-BYTES` a tensor of `--result-bytes` in chunks of BYTES; `parked`
nothing at all, so that its jobs stay where they are. No torch is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
from collections import deque
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import structlog
import uvloop
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.session import Session

LAYERS, TOKENS = 4, 4
_AT_ONCE = 256
"""Jobs in one pass of the engine that does nothing."""


def _header() -> types_pb2.TraceHeader:
    return types_pb2.TraceHeader(
        token_ids=range(TOKENS),
        tokens=[f"t{index}" for index in range(TOKENS)],
        targets=[types_pb2.ResolvedTarget(token_id=7, token="dogs", logit=3.5, position=3)],
        provenance=types_pb2.Provenance(
            model="idle",
            revision="r1",
            rule="attnlrp",
            reduction="token",
            dtype=types_pb2.SCALAR_TYPE_FLOAT32,
            attention="sdpa",
            device="cpu",
            versions={"lxt": "2.1", "torch": "2.13.0", "transformers": "5.23.0"},
        ),
    )


def result_of(size: int, chunk_bytes: int) -> list[types_pb2.ResultChunk]:
    """Return a job's result without its id: one float32 tensor of `size` bytes, in chunks."""
    data = random.Random(0).randbytes(min(size, 1 << 20))
    data = data * (size // len(data))
    shape = (LAYERS, size // (4 * LAYERS))
    chunks = []
    for offset in range(0, size, chunk_bytes):
        chunk = types_pb2.ResultChunk(number=1 + len(chunks))
        chunk.tensors.add(
            site="resid",
            dtype=types_pb2.SCALAR_TYPE_FLOAT32,
            shape=shape,
            offset=offset,
            data=data[offset : offset + chunk_bytes],
        )
        chunks.append(chunk)
    chunks[0].header.CopyFrom(_header())
    chunks[-1].end.CopyFrom(types_pb2.JobEnd(state=types_pb2.JOB_STATE_SUCCEEDED, attempt=1))
    return chunks


class IdleRunner:
    """Answers every job with the same result."""

    def __init__(self, result: list[types_pb2.ResultChunk]) -> None:
        self._result = result
        self._waiting: deque[LeaseKey] = deque()
        self._arrived = asyncio.Event()
        self._crowded = 0

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        self._waiting.extend(LeaseKey(lease.job_id, lease.attempt) for lease in leases)
        self._arrived.set()
        return []

    async def next_results(self) -> list[Chunks]:
        while not self._waiting or not self._result:
            self._arrived.clear()
            await self._arrived.wait()
        count = min(len(self._waiting), _AT_ONCE)
        batch = [self._waiting.popleft() for _ in range(count)]
        self._crowded = count if self._waiting else 0
        if len(self._result) > 1:
            return [self._chunks(key) for key in batch]
        # As the engine's runner does: a result of one chunk is made before it is asked for.
        return [chain([next(self._chunks(key))]) for key in batch]

    def _chunks(self, key: LeaseKey) -> Chunks:
        for template in self._result:
            leased = worker_pb2.LeasedChunk(attempt=key.attempt, chunk=template)
            leased.chunk.job_id = key.job_id
            yield leased

    def drop(self, keys: set[LeaseKey]) -> None:
        self._waiting = deque(key for key in self._waiting if key not in keys)

    def full_pass_jobs(self) -> int:
        return self._crowded

    def store_large(self, *settings: object) -> None:
        """Send all results, however large."""

    def take_back(self) -> list[LeaseKey]:
        keys = list(self._waiting)
        self._waiting.clear()
        return keys


def session_of(
    scheduler: str,
    model: str,
    result: list[types_pb2.ResultChunk],
    worker_id: str = "",
    seed: int | None = None,
) -> Session:
    info = types_pb2.ModelInfo(
        name=model,
        revision="r1",
        architecture="LlamaForCausalLM",
        layers=LAYERS,
        hidden_size=8,
        heads=2,
        intermediate_size=16,
        vocab_size=1000,
        context_length=4096,
        dtype=types_pb2.SCALAR_TYPE_FLOAT32,
        sites=["resid"],
        rules=["attnlrp"],
        reductions=["token"],
    )
    name = worker_id or f"idle-{model}"
    hello = worker_pb2.Hello(worker_id=name, model=info, device="cpu", version="0")
    return Session(scheduler, hello, IdleRunner(result), seed=seed)


async def _work(sessions: list[Session]) -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    working = [asyncio.create_task(session.run()) for session in sessions]
    stopping = asyncio.create_task(asked.wait())
    await asyncio.wait([stopping, *working], return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, *working):
        task.cancel()
    for error in await asyncio.gather(*working, return_exceptions=True):
        if isinstance(error, Exception):
            raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheduler", required=True)
    parser.add_argument("--result-bytes", type=int, default=1 << 20)
    parser.add_argument("--chunk-bytes", type=int, nargs="*", default=[])
    given = parser.parse_args()
    results: dict[str, list[types_pb2.ResultChunk]] = {
        "tiny": result_of(4 * LAYERS * TOKENS, 1 << 20),
        "parked": [],
    }
    for size in given.chunk_bytes:
        results[f"chunk-{size}"] = result_of(given.result_bytes, size)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    assert "torch" not in sys.modules, "the session must not need torch"
    # Loop and session as the real worker makes them.
    uvloop.run(_serve(given.scheduler, results))


async def _serve(scheduler: str, results: dict[str, list[types_pb2.ResultChunk]]) -> None:
    await _work([session_of(scheduler, model, result) for model, result in results.items()])


if __name__ == "__main__":
    main()
