"""Work whose result is known beforehand: what the stand-in engine computes, and from what.

A job's input ids are not tokens but what to do: `Work.spec` writes them, `Work.of` reads them. The
result is a function of the number alone, so that whoever reads it knows every byte.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from reltrace_proto.v1 import types_pb2, worker_pb2

MODEL = types_pb2.ModelInfo(
    name="stand-in",
    revision="1",
    architecture="none",
    layers=1,
    # The four ids in full are half a megabyte.
    hidden_size=1 << 15,
    vocab_size=2**32 - 1,
    context_length=8,
    dtype=types_pb2.SCALAR_TYPE_FLOAT32,
    sites=["resid"],
    rules=["attnlrp"],
    reductions=["token", "full"],
)

CHUNK_BYTES = 1 << 18
"""Smaller than the real chunks, so that results of many chunks stay cheap."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one job does.

    Parameters
    ----------
    number
        Seed of the result: another number gives other bytes.
    size
        Bytes of the result, a multiple of 4.
    milliseconds
        How long the pass takes.
    deadly
        The pass kills the process that it runs in.
    endless
        The pass never ends.
    """

    number: int
    size: int = 64
    milliseconds: int = 0
    deadly: bool = False
    endless: bool = False

    @property
    def ids(self) -> list[int]:
        return [self.number, self.size, self.milliseconds, self.deadly + 2 * self.endless]

    @property
    def spec(self) -> types_pb2.JobSpec:
        return types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=self.ids))

    @classmethod
    def of(cls, spec: types_pb2.JobSpec) -> Work:
        number, size, milliseconds, fate = spec.input_ids.ids
        return cls(number, size, milliseconds, fate == 1, fate == 2)

    @property
    def data(self) -> bytes:
        return random.Random(self.number).randbytes(self.size)


def drawn(numbers: range, source: random.Random) -> list[Work]:
    """Draw jobs: most are tiny, some are one long chunk, several chunks, or slow."""
    works = []
    for number in numbers:
        kind = source.random()
        if kind < 0.85:
            works.append(Work(number, 4 * source.randint(1, 1000)))
        elif kind < 0.92:
            # Past what the store keeps inside its stream's entry.
            works.append(Work(number, 4 * source.randint(20_000, 60_000)))
        elif kind < 0.95:
            works.append(Work(number, 4 * source.randint(70_000, 400_000)))
        else:
            works.append(Work(number, 64, milliseconds=source.randint(50, 600)))
    return works


def chunks(work: Work, lease: worker_pb2.Lease) -> Iterator[worker_pb2.LeasedChunk]:
    """Yield the numbered chunks of a job's result."""
    data = work.data
    count = max(1, -(-len(data) // CHUNK_BYTES))
    for index in range(count):
        offset = index * CHUNK_BYTES
        chunk = types_pb2.ResultChunk(job_id=lease.job_id, number=index + 1)
        if index == 0:
            chunk.header.token_ids.extend(work.ids)
            chunk.header.tokens.extend(map(str, work.ids))
            chunk.header.targets.add(token_id=work.number, token=str(work.number))
            chunk.header.provenance.model = MODEL.name
        chunk.tensors.add(
            site="resid",
            dtype=types_pb2.SCALAR_TYPE_FLOAT32,
            shape=[1, len(data) // 4],
            offset=offset,
            data=data[offset : offset + CHUNK_BYTES],
        )
        if index == count - 1:
            chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
            chunk.end.attempt = lease.attempt
            chunk.end.timings.queued.CopyFrom(lease.queued_for)
        yield worker_pb2.LeasedChunk(attempt=lease.attempt, chunk=chunk)


def digest(chunk: types_pb2.ResultChunk) -> str:
    """Digest what a chunk says of the result: all but its job's id, attempt and waiting time."""
    bare = types_pb2.ResultChunk()
    bare.CopyFrom(chunk)
    bare.ClearField("job_id")
    if bare.HasField("end"):
        bare.end.ClearField("attempt")
        bare.end.ClearField("timings")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def expected(work: Work) -> list[str]:
    """Digests of the chunks that a job's result has, whoever computes it."""
    lease = worker_pb2.Lease(job_id="any-0", attempt=1, spec=work.spec)
    return [digest(leased.chunk) for leased in chunks(work, lease)]
