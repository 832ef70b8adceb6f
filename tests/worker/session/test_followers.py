"""How rank 0 talks to the further processes of a worker: with stand-ins for what they compute."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from reltrace_proto.v1 import worker_pb2
from reltrace_worker.session import followers as module
from reltrace_worker.session.followers import Followers
from reltrace_worker.session.watchdog import Watchdog
from reltrace_worker.types.errors import DeviceLostError

Start = Callable[[str], Followers]

READ = "import json, os, sys\nread = lambda: json.loads(sys.stdin.readline())\n"


@pytest.fixture
def lost() -> queue.SimpleQueue[str]:
    return queue.SimpleQueue()


@pytest.fixture
def start(tmp_path: Path, lost: queue.SimpleQueue[str]) -> Iterator[Start]:
    """Start one follower that runs a few lines of Python."""
    started: list[Followers] = []

    def start(lines: str) -> Followers:
        command = [sys.executable, "-c", READ + lines]
        started.append(Followers(2, tmp_path, command, lost.put))
        return started[-1]

    yield start
    for followers in started:
        followers.close()


def test_a_command_is_done_when_all_have_answered(start: Start) -> None:
    """
    Given a follower whose second pass fails
    If rank 0 runs three passes
    I expect it to be told to go on after that one, and the model's number in each command.
    """
    followers = start(
        "for answer in (True, False, True):\n"
        f"    print(os.environ['{module.RANK}'], read(), file=sys.stderr)\n"
        "    print(json.dumps(answer), flush=True)\n"
        "    if not answer:\n"
        "        assert read() == {'go on': True}\n"
        "read()\n"
    )
    commands = followers.of_model(3)
    for number in range(3):
        with commands.under_way({"trace": [number]}):
            pass


def test_a_follower_that_ends_is_told(start: Start, lost: queue.SimpleQueue[str]) -> None:
    """
    Given a follower that dies in a pass, in which rank 0 fails too
    I expect the device to count as lost, and whoever is to be told to be told.
    """
    commands = start("read()\nsys.exit(9)").of_model(0)
    with pytest.raises(DeviceLostError, match="rank 1 has ended"):  # noqa: SIM117
        with commands.under_way({"trace": []}):
            raise RuntimeError("Connection closed by peer")
    assert lost.get(timeout=20) == "rank 1 has ended with code 9"
    with pytest.raises(DeviceLostError, match="rank 1 has ended"), commands.under_way({}):
        raise AssertionError("a pass without the other rank")


def test_a_follower_that_is_elsewhere(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has left a pass in the middle, where the other one still waits for it."""
    monkeypatch.setattr(module, "_STEP_SECONDS", 0.2)
    commands = start("read()\nread()").of_model(0)
    with pytest.raises(DeviceLostError, match="rank 1 is not where"), commands.under_way({}):
        pass
    monkeypatch.undo()


@pytest.mark.parametrize("computing", [True, False])
async def test_a_rank_that_is_lost_ends_the_worker(start: Start, computing: bool) -> None:
    """
    Given a rank that ends in the middle of a pass, or between passes
    I expect the watchdog to name the jobs of the pass, or none.
    """
    followers, watchdog = start("read()"), Watchdog()
    followers.on_lost = watchdog.lose
    lease = worker_pb2.Lease(job_id="s-0")
    with ExitStack() as stack:
        if computing:
            stack.enter_context(watchdog.watching("engine", [lease], 60.0))
        followers.send({})
        async with asyncio.timeout(20):
            work = await watchdog.stuck()
    assert list(work.leases) == ([lease] if computing else [])
