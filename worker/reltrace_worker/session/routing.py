"""Several models in one worker: each has a runner, and their passes take turns on the device."""

import asyncio
from collections.abc import Mapping, Sequence

from reltrace_proto.v1 import worker_pb2

from reltrace_worker.session.leases import Chunks, FailedAttempt, JobRunner, LeaseKey


class RoutingRunner:
    """Gives every job to the runner of its model, which is named NAME or NAME@REVISION."""

    def __init__(self, runners: Mapping[str, JobRunner]) -> None:
        self._routes = dict(runners)
        # A model has two routes and one runner.
        self._runners = list(dict.fromkeys(runners.values()))
        self._waiting: dict[asyncio.Task[Sequence[Chunks | FailedAttempt]], JobRunner] = {}
        self._last = self._runners[0]

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        by_runner: dict[JobRunner, list[worker_pb2.Lease]] = {}
        for lease in leases:
            by_runner.setdefault(self._routes[lease.spec.model], []).append(lease)
        ended = await asyncio.gather(*(runner.add(own) for runner, own in by_runner.items()))
        return [chunks for of_runner in ended for chunks in of_runner]

    async def next_results(self) -> Sequence[Chunks | FailedAttempt]:
        """Wait for the next pass of any model."""
        for runner in self._runners:
            if runner not in self._waiting.values():
                self._waiting[asyncio.ensure_future(runner.next_results())] = runner
        try:
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            for task in self._waiting:
                task.cancel()
            raise
        # What else is done comes with the next call.
        first = next(task for task in self._waiting if task in done)
        self._last = self._waiting.pop(first)
        return first.result()

    def full_pass_jobs(self) -> int:
        return self._last.full_pass_jobs()

    def drop(self, keys: set[LeaseKey]) -> None:
        for runner in self._runners:
            runner.drop(keys)

    def take_back(self) -> list[LeaseKey]:
        return [key for runner in self._runners for key in runner.take_back()]

    def store_large(self, url: str, above: int, most: int, outputs: Sequence[str] = ()) -> None:
        for runner in self._runners:
            runner.store_large(url, above, most, outputs)
