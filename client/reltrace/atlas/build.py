"""Builds an atlas: slices of a corpus to workers, their results merged into a folder."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from reltrace_proto.v1 import types_pb2

from reltrace.atlas.folder import Folder, State
from reltrace.atlas.slice_jobs import Made, Sender, free
from reltrace.atlas.slices import Slice, slices
from reltrace.calls.pinning import Pins
from reltrace.calls.source import check_iterable
from reltrace.calls.threads import gather_shielded, shielded_to_thread
from reltrace.transport.connection import Connection
from reltrace.transport.submit import Accepted
from reltrace.types import target
from reltrace.types.checks import check_same_settings, whole_number
from reltrace.types.errors import invalid
from reltrace.types.prompt import MAX_JOB_BYTES
from reltrace.types.request import Job, Priority, model_name, wire_priority

_AT_ONCE = 8
"""Slices on their way: what a few workers have, and what comes after. `Room` bounds how many of
them are read."""

_ALL_POSITIONS = 1 << 16
"""As many as a prompt of an atlas can have."""

_LEAST_SECONDS = 1.0
_PAUSE = 10.0
"""What is merged is written when so many times the time has gone by that writing took, and at
least a second: writing takes no more than a tenth. Until then the server keeps it too, for who goes
on after a kill."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an atlas is built of, and how.

    Attributes
    ----------
    target : TargetLike or None
        None: each prompt explains its own next tokens.
    positions : int or None
        At so many of a prompt's positions, drawn; None: at all.
    slice : int
        Prompts that a worker takes at a time, at most.
    keep_special : bool
        First and special tokens are counted.
    add_special_tokens : bool
        As in `trace`, of the prompts that are texts.
    """

    model: str | None
    rule: str
    target: Any
    k: int
    slice: int
    priority: Priority
    positions: int | None = None
    seed: int = 0
    keep_special: bool = False
    add_special_tokens: bool = True

    def check(self) -> None:
        """Check all of it before the first prompt is read."""
        for name, value, most in (("k", self.k, 64), ("slice", self.slice, 1 << 16)):
            whole_number(value, name, 1, most)
        whole_number(self.seed, "seed", 0, (1 << 64) - 1)
        if self.positions is None:
            if self.seed:
                raise invalid("seed", "draws positions, and none are drawn; give their number")
        else:
            whole_number(self.positions, "positions", 1, _ALL_POSITIONS)
            if self.target is not None:
                raise invalid("positions", "of each text's own next tokens exclude a target")
        if not isinstance(self.add_special_tokens, bool):
            raise invalid(
                "add_special_tokens", f"must be True or False, not {self.add_special_tokens!r}"
            )
        if target.is_several(self.target):
            raise invalid("target", "must be one, not several")
        wire_priority(self.priority)
        self.job(["x"])

    def job(self, prompts: Sequence[str | types_pb2.Chat], first: int = 0) -> Job:
        """Return the job of a slice, which begins with this prompt of the corpus."""
        corpus = types_pb2.Corpus(
            prompts=[prompt if isinstance(prompt, str) else "" for prompt in prompts],
            chats={
                number: prompt
                for number, prompt in enumerate(prompts)
                if not isinstance(prompt, str)
            },
            seed=self.seed,
            keep_special=bool(self.keep_special),
        )
        if self.target is None:
            corpus.positions = self.positions or _ALL_POSITIONS
        spec = types_pb2.JobSpec(
            model=model_name(self.model),
            rule=self.rule,
            targets=() if self.target is None else target.to_wire(self.target),
            top_k=self.k,
            corpus=corpus,
            # Not said where it is the default: a server that does not know the field serves it too.
            add_special_tokens=None if self.add_special_tokens else False,
        )
        if spec.ByteSize() > MAX_JOB_BYTES:
            raise invalid(
                "slice",
                f"{len(prompts)} prompts make a job of {spec.ByteSize()} bytes; the limit is "
                f"{MAX_JOB_BYTES}: take fewer at a time",
            )
        return Job(spec, (), False, self.target, first)

    def about(self) -> dict[str, Any]:
        """Return what a folder must agree on."""
        return {
            "model": self.model or "",
            "rule": self.rule,
            "target": None if self.target is None else _known_again(self.target),
            "positions": self.positions,
            "seed": self.seed,
            "keep_special": self.keep_special,
            "add_special_tokens": self.add_special_tokens,
            "k": self.k,
            "slice": self.slice,
        }


def _known_again(target: Any) -> str | int:
    """Return what JSON keeps of a target: of an id the number, which is not the text of it."""
    return operator.index(target) if hasattr(target, "__index__") else str(target)


async def build(
    connection: Connection,
    prompts: Iterable[str | Mapping[str, Any]],
    out: Path,
    plan: Plan,
    progress: Callable[[int], None],
) -> State:
    """Build what is missing of an atlas. See `Client.build_atlas`.

    Parameters
    ----------
    progress : callable
        Takes how many further prompts are in it.
    """
    plan.check()
    check_iterable(prompts, "prompts")
    source = slices(prompts, plan.slice)
    # Before the folder is touched: of what is no corpus nothing is left behind.
    first = await asyncio.to_thread(next, source, None)
    if first is None:
        raise invalid("prompts", "there are none: the corpus is empty")
    folder = Folder(out)
    try:
        await shielded_to_thread(folder.hold)
        # Not before it is held: another may have been building here until then.
        state = await asyncio.to_thread(folder.read) if folder.exists else State(plan.about())
        check_same_settings(state.about, plan.about(), f"{out} holds an atlas")
        builder = _Builder(connection, folder, state, plan, progress)
        await builder.run(chain([first], source))
        await shielded_to_thread(folder.end)
    finally:
        folder.leave()
    return state


class _Builder:
    def __init__(
        self,
        connection: Connection,
        folder: Folder,
        state: State,
        plan: Plan,
        progress: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._pins = Pins(connection)
        self._folder = folder
        self._state = state
        self._plan = plan
        self._progress = progress
        self._sender: Sender | None = None
        self._write_at = time.monotonic() + _LEAST_SECONDS
        # One at a time has the state: who merges, or who writes.
        self._turn = asyncio.Lock()
        # A slice is, or was when it failed, merged in part, which must not be written. Nothing is
        # lost by that: the server has all that was merged since it was written last.
        self._torn = False
        # Merged, and not yet written.
        self._unwritten: list[Accepted] = []

    async def run(self, source: Iterator[Slice]) -> None:
        """Send slices, some at a time, and merge what comes back.

        Raises
        ------
        InvalidArgument
            The corpus is not that of the folder.
        """
        watch = asyncio.create_task(self._pins.watch())
        under_way: set[asyncio.Task[None]] = set()
        done: set[asyncio.Task[None]] = set()
        try:
            seen = prompts = 0
            more = True
            while more or under_way:
                while more and len(under_way) < _AT_ONCE:
                    following = await asyncio.to_thread(next, source, None)
                    if following is None:
                        more = False
                        break
                    seen, prompts = seen + 1, prompts + len(following.prompts)
                    if await self._missing(following):
                        sender = await self._begun()
                        under_way.add(asyncio.create_task(self._add(sender, following)))
                    else:
                        self._progress(len(following.prompts))
                if under_way:
                    done, under_way = await asyncio.wait(
                        {*under_way, watch},
                        timeout=self._until_written(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    under_way -= {watch}
                    for task in done:
                        task.result()
                    if self._until_written() == 0:
                        await self._write()
        finally:
            for task in (*under_way, watch):
                task.cancel()
            await gather_shielded([*under_way, *done, watch])
            # What failed together with the task whose error is raised has been seen, too.
            await asyncio.gather(*under_way, *done, watch, return_exceptions=True)
            await self._write()
        self._check_end(seen, prompts)

    async def _missing(self, some: Slice) -> bool:
        if some.number not in self._state.digests:
            return True
        async with self._turn:
            return await asyncio.to_thread(self._lost, some)

    def _lost(self, some: Slice) -> bool:
        """Tell of a slice that is in the atlas whether its prompts are not."""
        if self._state.digests[some.number] != some.digest:
            raise invalid(
                "prompts",
                f"are others than those of the atlas, from {some.first} on",
            )
        known_tokens = self._state.known_tokens()
        return not self._folder.has_corpus(some.number, len(some.prompts), known_tokens)

    def _check_end(self, seen: int, prompts: int) -> None:
        if further := [number for number in self._state.digests if number >= seen]:
            raise invalid(
                "prompts",
                f"end after {prompts}, and {self._folder.path} holds the atlas of more: "
                f"{len(further)} further slices, the last of them from prompt "
                f"{self._state.firsts()[max(further)]} on; give its whole corpus, or another "
                "folder",
            )

    async def _begun(self) -> Sender:
        """Return the sender; the first time, note in the folder that it is being built."""
        if self._sender is None:
            identity = await asyncio.to_thread(self._folder.begin)
            self._sender = Sender(
                self._connection, identity, self._plan.about(), self._plan.priority, self._pins
            )
        return self._sender

    async def _add(self, sender: Sender, some: Slice) -> None:
        job = self._plan.job(some.prompts, some.first)
        # What has made a part of the atlas makes the rest.
        made_by = "@".join(filter(None, self._state.about.get("made_by", ())))
        job.spec.model = made_by or job.spec.model
        async with sender.made(some.number, some.digest, job) as made, self._turn:
            if self._torn:
                # The error by which it is ends the build.
                return
            await shielded_to_thread(self._merge, some, made)
        self._progress(len(some.prompts))

    def _merge(self, some: Slice, made: Made) -> None:
        part = made.part
        made_by = (part.provenance.model, part.provenance.revision)
        known = self._state.about.setdefault("made_by", list(made_by))
        if tuple(known) != made_by:
            raise invalid(
                "model", f"{made_by} is not {tuple(known)}, which made the rest of the atlas"
            )
        self._folder.write_corpus(some.number, part)
        # Of one that is in it already, only the corpus was lost.
        if some.number not in self._state.digests:
            self._torn = True
            self._state.add(some.number, some.digest, part)
            self._torn = False
        self._unwritten.append(made.accepted)

    def _until_written(self) -> float | None:
        """Return in how many seconds what is merged is to be written; None: all is."""
        if not self._unwritten:
            return None
        return max(0, self._write_at - time.monotonic())

    async def _write(self) -> None:
        async with self._turn:
            if self._torn or not self._unwritten:
                return
            began = time.monotonic()
            await shielded_to_thread(self._folder.write, self._state)
            ended = time.monotonic()
            self._write_at = ended + max(_LEAST_SECONDS, _PAUSE * (ended - began))
            written, self._unwritten = self._unwritten, []
        await free(self._connection, written)
