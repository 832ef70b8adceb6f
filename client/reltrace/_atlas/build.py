"""Builds an atlas: slices of a corpus to workers, their results merged into a folder."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reltrace_proto.v1 import types_pb2

from reltrace import _target
from reltrace._atlas.folder import Folder, State
from reltrace._atlas.part import AtlasPart
from reltrace._errors import TraceError, invalid
from reltrace._request import MAX_JOB_BYTES, Job, Priority, model_name, wire_priority
from reltrace._transport.connection import Connection, Deadline
from reltrace._transport.submission import Entry, Rejected, deliveries, submit

_AT_ONCE = 8
"""Slices on their way: what a few workers have, and what comes after."""

_LEAST_SECONDS = 1.0
_PAUSE = 10.0
"""What is merged is written when so many times the time has gone by that writing took, and at
least a second: a kill costs no more than that, and writing no more than a tenth."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an atlas is built of, and how.

    Attributes
    ----------
    slice : int
        Prompts that a worker takes at a time.
    """

    model: str | None
    rule: str
    target: Any
    k: int
    slice: int
    priority: Priority

    def check(self) -> None:
        """Check all of it before the first prompt is read."""
        for name, value, most in (("k", self.k, 64), ("slice", self.slice, 1 << 16)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise invalid(name, f"must be 1 to {most}, not {value!r}")
        if _target.is_several(self.target):
            raise invalid("target", "must be one, not several")
        wire_priority(self.priority)
        self.job(["x"])

    def job(self, prompts: list[str]) -> Job:
        """Return the job of a slice."""
        spec = types_pb2.JobSpec(
            model=model_name(self.model),
            rule=self.rule,
            targets=_target.to_wire(self.target),
            top_k=self.k,
            corpus=types_pb2.Corpus(prompts=prompts),
        )
        if spec.ByteSize() > MAX_JOB_BYTES:
            raise invalid(
                "slice",
                f"{len(prompts)} prompts make a job of {spec.ByteSize()} bytes; the limit is "
                f"{MAX_JOB_BYTES}: take fewer at a time",
            )
        return Job(spec, (), False, self.target)

    def about(self) -> dict[str, Any]:
        """Return what a folder must agree on."""
        return {
            "model": self.model or "",
            "rule": self.rule,
            "target": str(self.target),
            "k": self.k,
            "slice": self.slice,
        }


def slices(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Cut a corpus."""
    iterator = iter(prompts)
    while some := list(islice(iterator, size)):
        for index, prompt in enumerate(some):
            if not isinstance(prompt, str):
                raise invalid(f"prompts[{index}]", f"must be text, not {type(prompt).__name__}")
        yield some


def digest(prompts: list[str]) -> str:
    """Return what tells the prompts of a slice from others."""
    whole = hashlib.sha256()
    for prompt in prompts:
        data = prompt.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


async def build(
    connection: Connection,
    prompts: Iterable[str],
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
    folder = Folder(out)
    state = await asyncio.to_thread(folder.read) if folder.exists else State(plan.about())
    given = {name: state.about.get(name) for name in plan.about()}
    if given != plan.about():
        raise invalid("out", f"{out} holds an atlas of other settings: {given}")
    builder = _Builder(connection, folder, state, plan, progress)
    await builder.run(slices(prompts, plan.slice))
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
        self._folder = folder
        self._state = state
        self._plan = plan
        self._progress = progress
        self._write_at = time.monotonic() + _LEAST_SECONDS

    async def run(self, source: Iterator[list[str]]) -> None:
        """Send slices, some at a time, and merge what comes back."""
        under_way: set[asyncio.Task[tuple[int, str, AtlasPart]]] = set()
        done: set[asyncio.Task[tuple[int, str, AtlasPart]]] = set()
        try:
            number = 0
            more = True
            while more or under_way:
                while more and len(under_way) < _AT_ONCE:
                    some = await asyncio.to_thread(next, source, None)
                    if some is None:
                        more = False
                        break
                    if self._missing(number, found := digest(some)):
                        under_way.add(asyncio.create_task(self._make(number, found, some)))
                    else:
                        self._progress(len(some))
                    number += 1
                if under_way:
                    done, under_way = await asyncio.wait(
                        under_way, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        await asyncio.to_thread(self._merge, *task.result())
                        self._progress(len(task.result()[2].arrays["corpus"]["lengths"]))
        finally:
            for task in under_way:
                task.cancel()
            # Also of those that failed together with the one whose error is raised.
            await asyncio.gather(*under_way, *done, return_exceptions=True)
            if self._state.digests:
                await asyncio.to_thread(self._folder.write, self._state)

    def _missing(self, number: int, found: str) -> bool:
        known = self._state.digests.get(number)
        if known is None:
            return True
        if known != found:
            raise invalid(
                "prompts",
                f"are others than those of the atlas, from {number * self._plan.slice} on",
            )
        return False

    async def _make(
        self, number: int, found: str, prompts: list[str]
    ) -> tuple[int, str, AtlasPart]:
        entries = [Entry(self._plan.job(prompts), None)]
        deadline = Deadline(None)
        priority = wire_priority(self._plan.priority)
        answer = await submit(self._connection, entries, deadline, priority)
        if isinstance(answer, Rejected):
            raise answer.errors[0]
        async for delivery in deliveries(self._connection, answer, entries, deadline):
            if isinstance(delivery.outcome, TraceError):
                raise delivery.outcome
            assert isinstance(delivery.outcome, AtlasPart)
            part = delivery.outcome
        return number, found, part

    def _merge(self, number: int, found: str, part: AtlasPart) -> None:
        made = (part.provenance.model, part.provenance.revision)
        known = self._state.about.setdefault("made_by", list(made))
        if tuple(known) != made:
            raise invalid(
                "model", f"{made} is not {tuple(known)}, which made the rest of the atlas"
            )
        self._folder.write_corpus(number, part)
        self._state.add(number, found, part)
        began = time.monotonic()
        if began >= self._write_at:
            self._folder.write(self._state)
            ended = time.monotonic()
            self._write_at = ended + max(_LEAST_SECONDS, _PAUSE * (ended - began))
