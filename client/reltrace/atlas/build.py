"""Builds an atlas: slices of a corpus to workers, their results merged into a folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from reltrace.atlas.corpus import open_slice, write_slice
from reltrace.atlas.folder import AtlasFolder
from reltrace.atlas.jobs import BuiltShard, SliceJobs, free_shards
from reltrace.atlas.settings import AtlasSettings
from reltrace.atlas.slices import Slice, slices
from reltrace.atlas.state import State
from reltrace.calls.pinning import Pins
from reltrace.calls.source import check_iterable
from reltrace.calls.threads import gather_shielded, shielded_to_thread
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.types.checks import check_same_settings
from reltrace.types.errors import InvalidArgument, invalid

_CONCURRENT_SLICES = 8
"""Submitted at a time: what a few workers run, and what comes after. `PrefetchLimit` bounds how
many results are in memory."""

_MIN_PAUSE = 1.0
_PAUSE_PER_WRITE = 10.0
"""The state is written when so many times the time of the last write has gone by, and at least a
second: writing takes no more than a tenth. Until then the server keeps the results, too."""


async def build(
    connection: Connection,
    prompts: Iterable[str | Mapping[str, Any]],
    out: Path,
    settings: AtlasSettings,
    progress: Callable[[int], None],
) -> State:
    """Build what is missing of an atlas. See `Client.build_atlas`.

    `progress` takes the number of further prompts that are in the atlas.
    """
    settings.check()
    check_iterable(prompts, "prompts")
    source = slices(prompts, settings.slice)
    # Before the folder is created: a wrong corpus leaves nothing behind.
    first = await asyncio.to_thread(next, source, None)
    if first is None:
        raise invalid("prompts", "there are none: the corpus is empty")
    folder = AtlasFolder(out)
    with folder.lock():
        # After it is locked: another process may have built here until then.
        exists = folder.exists
        state = await asyncio.to_thread(folder.read) if exists else State(settings.about())
        check_same_settings(state.about, settings.about(), f"{out} holds an atlas")
        identity = await asyncio.to_thread(folder.begin_build)
        builder = _Builder(connection, folder, identity, state, settings, progress)
        await builder.run(chain([first], source))
        await shielded_to_thread(folder.finish_build)
    return state


class _Builder:
    def __init__(
        self,
        connection: Connection,
        folder: AtlasFolder,
        identity: str,
        state: State,
        settings: AtlasSettings,
        progress: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._pins = Pins(connection)
        self._jobs = SliceJobs(connection, identity, settings, self._pins)
        self._folder = folder
        self._state = state
        self._settings = settings
        self._progress = progress
        self._write_at = time.monotonic() + _MIN_PAUSE
        # Of the state: for merging and writing.
        self._lock = asyncio.Lock()
        # A slice is, or was when it failed, merged in part: such a state must not be written.
        # Nothing is lost by that: the server has all results since the last write.
        self._inconsistent = False
        # Merged, and not yet written.
        self._unwritten: list[Submission] = []

    async def run(self, source: Iterator[Slice]) -> None:
        watch = asyncio.create_task(self._pins.watch())
        running: set[asyncio.Task[None]] = set()
        done: set[asyncio.Task[None]] = set()
        try:
            seen = prompts = 0
            more = True
            while more or running:
                while more and len(running) < _CONCURRENT_SLICES:
                    slice_ = await asyncio.to_thread(next, source, None)
                    if slice_ is None:
                        more = False
                        break
                    seen, prompts = seen + 1, prompts + len(slice_.prompts)
                    if await self._is_missing(slice_):
                        running.add(asyncio.create_task(self._add(slice_)))
                    else:
                        self._progress(len(slice_.prompts))
                if running:
                    done, running = await asyncio.wait(
                        {*running, watch},
                        timeout=self._seconds_to_write(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    running -= {watch}
                    for task in done:
                        task.result()
                    if self._seconds_to_write() == 0:
                        await self._write()
        finally:
            for task in (*running, watch):
                task.cancel()
            await gather_shielded([*running, *done, watch])
            # Retrieves the errors of tasks that failed beside the one whose error is raised.
            await asyncio.gather(*running, *done, watch, return_exceptions=True)
            await self._write()
        self._check_end(seen, prompts)

    async def _is_missing(self, slice_: Slice) -> bool:
        if slice_.number not in self._state.digests:
            return True
        async with self._lock:
            return await asyncio.to_thread(self._lacks_corpus, slice_)

    def _lacks_corpus(self, slice_: Slice) -> bool:
        """Tell whether the folder lacks the tokens of a slice that is merged."""
        if self._state.digests[slice_.number] != slice_.digest:
            raise invalid("prompts", f"differ from those of the atlas, from {slice_.first} on")
        try:
            known_tokens = self._state.known_tokens()
            found = open_slice(self._folder.path, slice_.number, known_tokens)
        except InvalidArgument:
            return True
        return len(found) != len(slice_.prompts)

    def _check_end(self, seen: int, prompts: int) -> None:
        if further := [number for number in self._state.digests if number >= seen]:
            raise invalid(
                "prompts",
                f"end after {prompts}, and {self._folder.path} holds the atlas of more: "
                f"{len(further)} further slices, the last of them from prompt "
                f"{self._state.first_prompts()[max(further)]} on; give its whole corpus, or "
                "another folder",
            )

    async def _add(self, slice_: Slice) -> None:
        job = self._settings.job(slice_.prompts, slice_.first)
        # The same revision as of the slices that are merged.
        made_by = "@".join(filter(None, self._state.about.get("made_by", ())))
        job.spec.model = made_by or job.spec.model
        async with self._jobs.build(slice_.number, slice_.digest, job) as built, self._lock:
            if self._inconsistent:
                # The error that caused this ends the build.
                return
            await shielded_to_thread(self._merge, slice_, built)
        self._progress(len(slice_.prompts))

    def _merge(self, slice_: Slice, built: BuiltShard) -> None:
        provenance = built.shard.provenance
        made_by = (provenance.model, provenance.revision)
        known = self._state.about.setdefault("made_by", list(made_by))
        if tuple(known) != made_by:
            raise invalid(
                "model", f"{made_by} is not {tuple(known)}, which made the rest of the atlas"
            )
        write_slice(self._folder.path, slice_.number, built.shard)
        # Of a slice that is merged already, only the corpus was missing.
        if slice_.number not in self._state.digests:
            self._inconsistent = True
            self._state.add(slice_.number, slice_.digest, built.shard)
            self._inconsistent = False
        self._unwritten.append(built.submission)

    def _seconds_to_write(self) -> float | None:
        """Return in how many seconds the state is to be written; None: there is nothing new."""
        if not self._unwritten:
            return None
        return max(0, self._write_at - time.monotonic())

    async def _write(self) -> None:
        async with self._lock:
            if self._inconsistent or not self._unwritten:
                return
            began = time.monotonic()
            await shielded_to_thread(self._folder.write, self._state)
            ended = time.monotonic()
            self._write_at = ended + max(_MIN_PAUSE, _PAUSE_PER_WRITE * (ended - began))
            written, self._unwritten = self._unwritten, []
        await free_shards(self._connection, written)
