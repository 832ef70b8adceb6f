"""An iterator over a run that returns its results in batches."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from reltrace.calls.progress import Progress

T = TypeVar("T")


class Run(Protocol[T]):
    """A run of jobs on the event loop."""

    async def take(self) -> list[T]:
        """Return further results; an empty list at the end."""
        ...

    async def close(self) -> None:
        """Stop, and cancel the jobs that have not ended."""
        ...


async def iterate(run: Run[T], progress: Progress) -> AsyncGenerator[T, None]:
    """Yield the results of a run, one by one."""
    try:
        with progress:
            while results := await run.take():
                for result in results:
                    progress.count(result)
                    yield result
    finally:
        await run.close()
