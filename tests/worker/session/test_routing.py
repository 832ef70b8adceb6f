"""Several models in one worker: every job comes to the runner of its model."""

import asyncio
from collections.abc import Sequence

import pytest
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.routing import RoutingRunner


class Recorder:
    """Takes jobs in, and gives results when it is told to."""

    def __init__(self, name: str, *, full_pass_jobs: int = 0) -> None:
        self.name = name
        self.keys: list[LeaseKey] = []
        self.large: tuple[str, int, int] | None = None
        self.passes: asyncio.Queue[list[Chunks]] = asyncio.Queue()
        self._full_pass_jobs = full_pass_jobs

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        self.keys += [LeaseKey(lease.job_id, lease.attempt) for lease in leases]
        return [iter(()) for lease in leases if lease.spec.prompt == "bad"]

    async def next_results(self) -> list[Chunks]:
        return await self.passes.get()

    def full_pass_jobs(self) -> int:
        return self._full_pass_jobs

    def drop(self, keys: set[LeaseKey]) -> None:
        self.keys = [key for key in self.keys if key not in keys]

    def take_back(self) -> list[LeaseKey]:
        taken, self.keys = self.keys, []
        return taken

    def store_large(self, url: str, above: int, most: int, outputs: Sequence[str] = ()) -> None:
        self.large = (url, above, most, outputs)


def lease(job: str, model: str, prompt: str = "a") -> worker_pb2.Lease:
    spec = types_pb2.JobSpec(model=model, prompt=prompt)
    return worker_pb2.Lease(job_id=job, attempt=1, spec=spec)


@pytest.fixture
def pair() -> tuple[Recorder, Recorder, RoutingRunner]:
    first, second = Recorder("first"), Recorder("second", full_pass_jobs=3)
    routes = {"first": first, "first@r1": first, "second": second, "second@r1": second}
    return first, second, RoutingRunner(routes)


async def test_jobs_go_by_name_and_by_revision(
    pair: tuple[Recorder, Recorder, RoutingRunner],
) -> None:
    first, second, both = pair
    faulty = await both.add(
        [lease("a", "first"), lease("b", "second", "bad"), lease("c", "first@r1")]
    )
    assert [key.job_id for key in first.keys] == ["a", "c"]
    assert [key.job_id for key in second.keys] == ["b"]
    assert len(faulty) == 1
    both.drop({LeaseKey("c", 1)})
    assert {key.job_id for key in both.take_back()} == {"a", "b"}
    both.store_large("file:///x", 7, 9, ["file:///y"])
    assert first.large == second.large == ("file:///x", 7, 9, ["file:///y"])


async def test_results_come_from_whichever_is_done_and_none_is_lost(
    pair: tuple[Recorder, Recorder, RoutingRunner],
) -> None:
    """
    Given two models whose passes end at the same time
    I expect one's results, then the other's, each with the jobs of its full pass.
    """
    first, second, both = pair
    one, two = iter([worker_pb2.LeasedChunk()]), iter([worker_pb2.LeasedChunk()])
    first.passes.put_nowait([one])
    second.passes.put_nowait([two])
    seen = []
    for _ in range(2):
        async with asyncio.timeout(5):
            (chunks,) = await both.next_results()
        seen.append((chunks, both.full_pass_jobs()))
    assert sorted(seen, key=lambda pair: pair[1]) == [(one, 0), (two, 3)]


async def test_whoever_stops_waiting_stops_all(
    pair: tuple[Recorder, Recorder, RoutingRunner],
) -> None:
    _, _, both = pair
    waiting = asyncio.create_task(both.next_results())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
