"""Many workers in one process: real sessions, whose engine is a clock.

Each worker is a `Session` of its own with a runner of its own. Requests come as JSON lines on
standard input, each is answered with one line on standard output: `connect` starts the sessions,
`pace` says how long a pass takes and how many jobs it takes, `report` tells what was done. The
process ends with its input. No torch is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import structlog
import uvloop
from bench.idle_worker import LAYERS, TOKENS, IdleRunner
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session import endpoint, session
from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.watchdog import Work

MODEL = "tiny"
_NO_PACE_JOBS = 256
"""Jobs in a pass that takes no time."""

_BYTES_ACKED = 120
"""Where the kernel's `tcp_info` has bytes acknowledged and, after them, bytes received."""


@dataclass
class Pace:
    """How fast the engines of this process are: shared by its runners, changed between scenes."""

    seconds: float = 0.0
    jobs: int = _NO_PACE_JOBS


class ClockRunner(IdleRunner):
    """Answers up to `pace.jobs` jobs after `pace.seconds`, and counts."""

    def __init__(self, result: list[types_pb2.ResultChunk], pace: Pace) -> None:
        super().__init__(result)
        self._pace = pace
        self._pass_began: float | None = None
        self._busy = 0.0
        self._jobs = 0
        self._passes = 0

    async def next_results(self) -> list[Chunks]:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        count = min(len(self._waiting), self._pace.jobs)
        batch = [self._waiting.popleft() for _ in range(count)]
        self._crowded = bool(self._waiting)
        if self._pace.seconds:
            self._pass_began = time.monotonic()
            await asyncio.sleep(self._pace.seconds)
            self._busy += time.monotonic() - self._pass_began
            self._pass_began = None
        self._jobs += count
        self._passes += 1
        return [chain([self._chunk(key)]) for key in batch]

    def _chunk(self, key: LeaseKey) -> worker_pb2.LeasedChunk:
        return next(self._chunks(key))

    def done(self) -> dict[str, float]:
        """Return jobs, passes and seconds in passes since the start, the pass under way too."""
        began = self._pass_began
        under_way = 0.0 if began is None else time.monotonic() - began
        return {
            "jobs": self._jobs,
            "passes": self._passes,
            "busy": self._busy + under_way,
        }


def _result(size: int) -> types_pb2.ResultChunk:
    """Return a job's result without its id: one chunk with one float32 tensor."""
    chunk = types_pb2.ResultChunk(number=1)
    chunk.header.token_ids.extend(range(TOKENS))
    chunk.header.tokens.extend(f"t{index}" for index in range(TOKENS))
    chunk.header.targets.add(token_id=7, token="dogs", logit=3.5, position=3)
    provenance = chunk.header.provenance
    provenance.model, provenance.revision = MODEL, "r1"
    provenance.rule, provenance.reduction = "attnlrp", "token"
    provenance.dtype = types_pb2.SCALAR_TYPE_FLOAT32
    provenance.attention, provenance.device = "sdpa", "cpu"
    provenance.versions.update(lxt="2.1", torch="2.13.0", transformers="5.23.0")
    chunk.tensors.add(
        site="resid",
        dtype=types_pb2.SCALAR_TYPE_FLOAT32,
        shape=(LAYERS, size // (4 * LAYERS)),
        data=random.Random(0).randbytes(size),
    )
    chunk.end.state, chunk.end.attempt = types_pb2.JOB_STATE_SUCCEEDED, 1
    return chunk


def _hello(number: int) -> worker_pb2.Hello:
    info = types_pb2.ModelInfo(
        name=MODEL,
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
    return worker_pb2.Hello(worker_id=f"fleet-{number:05}", model=info, device="clock", version="0")


def _tcp_sockets() -> Iterator[socket.socket]:
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            # A duplicate: closing it leaves gRPC its own.
            one = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # the folder's own, or one that gRPC closed meanwhile
            continue
        with one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                yield one


def traffic() -> dict[str, int]:
    """Count this process's TCP connections, and the bytes that went over them each way."""
    tcp = sent = received = 0
    for one in _tcp_sockets():
        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        out, back = struct.unpack_from("=QQ", info, _BYTES_ACKED)
        tcp, sent, received = tcp + 1, sent + out, received + back
    return {"tcp": tcp, "sent": sent, "received": received}


class Told:
    """Counts what the sessions of this process say and do."""

    def __init__(self) -> None:
        self.connected = self.revoked = self.heartbeats = 0

    def __call__(self, _logger: Any, _method: str, event: Any) -> Any:
        """Take the place of a processor of the log: what is as it should be is not printed."""
        if event["event"] == "scheduler.connected":
            self.connected += 1
            raise structlog.DropEvent
        if event["event"] == "leases.revoked":
            self.revoked += event["jobs"]
        return event

    def heartbeat(self, keys: set[LeaseKey], work: Work | None) -> worker_pb2.WorkRequest:
        """Take the place of what writes a session's heartbeat."""
        self.heartbeats += 1
        return _write_heartbeat(keys, work)


_write_heartbeat = session.heartbeat


class Workers:
    """The sessions of this process, and what may be asked of them."""

    def __init__(
        self, addresses: str, first: int, count: int, result_bytes: int, told: Told
    ) -> None:
        self._pace = Pace()
        self._told = told
        result = [_result(result_bytes)]
        self._runners = [ClockRunner(result, self._pace) for _ in range(count)]
        self._sessions = [
            # Seeded: which scheduler a worker tries first is the same in every run.
            session.Session(addresses, _hello(first + index), runner, seed=first + index)
            for index, runner in enumerate(self._runners)
        ]
        self._running: list[asyncio.Task[None]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        for task in self._running:
            if task.done():
                # A session ends only with an error: the scheduler refused the worker.
                task.result()
                raise RuntimeError("a session has ended")
        match request["do"]:
            case "connect":
                self._running = [asyncio.create_task(one.run()) for one in self._sessions]
            case "pace":
                self._pace.seconds, self._pace.jobs = (
                    request["seconds"],
                    request["jobs"],
                )
            case "report":
                return {
                    "workers": [runner.done() for runner in self._runners],
                    **vars(self._told),
                    **traffic(),
                }
            case other:
                raise ValueError(other)
        return {}

    async def end(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def _serve(workers: Workers) -> None:
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    try:
        while line := await lines.readline():
            print(json.dumps(workers.answer(json.loads(line))), flush=True)
    finally:
        await workers.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedulers", required=True, help="addresses with commas between")
    parser.add_argument("--first", type=int, default=0, help="number of the first worker")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--result-bytes", type=int, default=4 * LAYERS * TOKENS)
    parser.add_argument("--share-connections", action="store_true")
    given = parser.parse_args()
    told = Told()
    structlog.configure(
        processors=[told, *structlog.get_config()["processors"]],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    assert "torch" not in sys.modules, "the session must not need torch"
    # In one process gRPC gives channels with equal options one connection. Workers on machines of
    # their own have one each, and so have these: nothing else of the session is changed.
    own = (*endpoint._CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    options = endpoint._CHANNEL_OPTIONS if given.share_connections else own
    with (
        mock.patch.object(endpoint, "_CHANNEL_OPTIONS", options),
        mock.patch.object(session, "heartbeat", told.heartbeat),
    ):
        uvloop.run(_run(given, told))


async def _run(given: argparse.Namespace, told: Told) -> None:
    await _serve(Workers(given.schedulers, given.first, given.workers, given.result_bytes, told))


if __name__ == "__main__":
    main()
