"""What the session and the runner of its jobs have in common; without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from reltrace_proto.v1 import types_pb2, worker_pb2

Chunks = Iterator[worker_pb2.LeasedChunk]

_LEAST_LEASES, _MOST_LEASES = 16, 256
_PASSES = 3
"""The one under way, the one after it, and what comes while results are uploaded."""


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """Names a lease; the attempt is its fencing token."""

    job_id: str
    attempt: int

    @classmethod
    def of(cls, message: worker_pb2.Lease | worker_pb2.LeaseRef | types_pb2.Draft) -> Self:
        return cls(message.job_id, message.attempt)


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A job whose attempt failed for a reason that may pass."""

    key: LeaseKey
    reason: str


class LeaseWindow:
    """How many leases a worker asks for: enough to fill the passes to come, and no more.

    What it holds beyond that waits here while another worker may be idle. Prompts are leased before
    their length is known, so the size follows the number of jobs in the last full pass.
    """

    def __init__(self) -> None:
        self.size = _MOST_LEASES
        self._offered = 0

    def reset_offers(self) -> None:
        """Begin anew: a connection knows nothing of what was offered before it."""
        self._offered = 0

    def add_leased(self, jobs: int) -> None:
        self._offered = max(0, self._offered - jobs)

    def adapt(self, full_pass_jobs: int) -> None:
        """Note a pass: `full_pass_jobs` as in `JobRunner`."""
        if full_pass_jobs:
            self.size = min(max(_PASSES * full_pass_jobs, _LEAST_LEASES), _MOST_LEASES)
        else:
            self.size = min(2 * self.size, _MOST_LEASES)

    def offer(self, held: int) -> int:
        """Return how many further jobs may be leased, which then count as offered."""
        jobs = max(0, self.size - held - self._offered)
        self._offered += jobs
        return jobs


class JobRunner(Protocol):
    """Runs leased jobs. Everything is called on the session's event loop."""

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        """Take jobs in; return the chunks of those that end without a pass."""

    async def next_results(self) -> Sequence[Chunks | FailedAttempt]:
        """Wait until jobs have ended; return for each an iterator of chunks, or why not.

        Nothing where jobs have begun beside which there may be room for others.
        """

    def full_pass_jobs(self) -> int:
        """Return how many jobs the pass of the last results took, if it left some behind, else 0.

        As it was when the pass took its jobs: what came later says nothing of its size.
        """

    def drop(self, keys: set[LeaseKey]) -> None:
        """Forget jobs, and go on no more with those that take many passes."""

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that have not begun, those being taken in too; return their leases."""

    def store_large(self, url: str, above: int, most: int, outputs: Sequence[str] = ()) -> None:
        """Store results of more than `above` bytes at `url`; empty: they are sent as well.

        A job that would send more than `most` bytes fails before its pass; 0: none does. Jobs may
        name folders in `outputs`, patterns with "{tenant}"; none: the scheduler does not say.

        Raises `WorkerError` where this worker can not write there.
        """
