"""What the three submitters share: they are told how many jobs, and answer how long it took."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

RESULT = "x" * 64
"""As large as the tensor of a tiny job."""

AT_ONCE = 256


def serve(library: str, submit: Callable[[int], object], fetch: Callable[[object], list]) -> None:
    """Answer every line of the standard input, a number of jobs, with its seconds."""
    _say(version=version(library))
    for line in sys.stdin:
        jobs = int(line)
        started = time.perf_counter()
        handles = submit(jobs)
        submitted = time.perf_counter()
        _check(fetch(handles), jobs)
        ended = time.perf_counter()
        _say(seconds=ended - started, submit_seconds=submitted - started)


async def serve_async(
    library: str,
    submit: Callable[[], Awaitable[object]],
    fetch: Callable[[object], Awaitable[object]],
) -> None:
    """The same for a library of coroutines: at most `AT_ONCE` calls are open."""
    _say(version=version(library))
    while line := await asyncio.to_thread(sys.stdin.readline):
        jobs = int(line)
        started = time.perf_counter()
        handles: list = []
        for start in range(0, jobs, AT_ONCE):
            count = min(AT_ONCE, jobs - start)
            handles += await asyncio.gather(*(submit() for _ in range(count)))
        submitted = time.perf_counter()
        results: list = []
        for start in range(0, jobs, AT_ONCE):
            results += await asyncio.gather(*map(fetch, handles[start : start + AT_ONCE]))
        _check(results, jobs)
        ended = time.perf_counter()
        _say(seconds=ended - started, submit_seconds=submitted - started)


def _check(results: list, jobs: int) -> None:
    if results != [RESULT] * jobs:
        raise RuntimeError(f"not the results of {jobs} jobs")


def _say(**answer: object) -> None:
    print(json.dumps(answer), flush=True)
