"""What the session and whoever runs its jobs have in common; it knows no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from reltrace_proto.v1 import worker_pb2

Chunks = Iterator[worker_pb2.LeasedChunk]


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """Names a lease; the attempt is its fencing token."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A job whose attempt broke off for a reason that may pass."""

    key: LeaseKey
    reason: str


class JobRunner(Protocol):
    """Runs leased jobs. Everything is called on the session's event loop."""

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        """Take jobs in; return the chunks of those that have failed already."""

    async def next_results(self) -> Sequence[Chunks | FailedAttempt]:
        """Wait until jobs have ended; return for each an iterator of chunks, or why not."""

    def drop(self, keys: set[LeaseKey]) -> None:
        """Forget jobs that have not begun."""

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that have not begun; return their leases."""
