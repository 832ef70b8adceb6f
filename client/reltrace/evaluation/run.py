"""Runs an evaluation: traces, then forward passes with something switched off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from reltrace.calls.iteration import iterate
from reltrace.calls.pinning import Pins
from reltrace.calls.progress import Progress
from reltrace.calls.source import Source, open_source
from reltrace.calls.trace_many import TraceManyRun
from reltrace.evaluation.curves import Curves
from reltrace.evaluation.evaluation import Evaluation
from reltrace.evaluation.prompts import Prompt, single_target
from reltrace.evaluation.settings import RANDOM, Settings
from reltrace.evaluation.tally import Tally
from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.types.errors import Failure, TraceError, Violation, invalid
from reltrace.types.request import Arguments, Priority, wire_priority
from reltrace.types.target import Target
from reltrace.types.trace import Trace

_CONCURRENT_PROMPTS = 64
"""Prompts whose traces and curves are in memory at a time."""

_SHARED = {"model": "model", "rule": "rules", "sites": "site", "reduce": "site"}
"""Fields of jobs that all prompts share, and the arguments of `evaluate` that set them."""

_SHARED_TARGET = ("target", "target.token", "target.contrast")


class Evaluator:
    """One evaluation.

    `arguments` has model and target of prompts that do not say otherwise; `done` is called once for
    each prompt that has been evaluated or has failed, with its Failure or None. Raises
    InvalidArgument if something is wrong that all prompts share.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        arguments: Arguments,
        priority: Priority,
        deadline: Deadline,
        done: Callable[[Failure | None], None],
    ) -> None:
        self._connection = connection
        self._pins = Pins(connection)
        self._settings = settings
        self._arguments = replace(arguments, target=single_target(arguments.target, "target"))
        self._arguments.template()
        wire_priority(priority)
        self._priority = priority
        self._deadline = deadline
        self._done = done
        self._rules = [rule for rule in settings.rules if rule != RANDOM]
        self._ids: dict[str | int, int] = {}
        self._failures: dict[int, Failure] = {}

    async def run(self, prompts: object) -> Evaluation:
        """Evaluate prompts, some dozens at a time; the prompts of a list are all checked first.

        Raises TraceError if something is wrong with all of them, such as the model.
        """
        source = open_source(prompts, "prompts")
        if isinstance(prompts, list | tuple):
            self._checked(prompts, 0)
        count, tally = 0, Tally(self._settings)
        try:
            replacement = await self._replacement()
            while values := await self._next(source):
                checked = self._checked(values, count)
                count += len(checked)
                for curves in await self._measured(checked, replacement[1]):
                    tally.add(curves)
        finally:
            await source.close()
        if not count:
            raise invalid("prompts", "is empty")
        failed = {one.id: one.reason for _, one in sorted(self._failures.items())}
        return tally.evaluation(replacement, failed)

    def _checked(self, values: Sequence[Any], first: int) -> list[Prompt]:
        """Check prompts, of which the first has this number; their ids must be unique."""
        prompts = [Prompt.of(number, one) for number, one in enumerate(values, first)]
        for prompt in prompts:
            earlier = self._ids.setdefault(prompt.id, prompt.number)
            if earlier != prompt.number:
                raise invalid(
                    f"prompts[{prompt.number}].id",
                    f"{prompt.id!r} is that of prompts[{earlier}]; by default the id is the "
                    "prompt's number",
                )
        return prompts

    async def _next(self, source: Source) -> list[Any]:
        """Return the next prompts; none at the end."""
        taken: list[Any] = []
        try:
            async with asyncio.timeout(self._deadline.remaining()) as limit:
                while len(taken) < _CONCURRENT_PROMPTS:
                    more = await source.take(_CONCURRENT_PROMPTS - len(taken), wait=True)
                    if more is None:
                        break
                    taken += more
        except TimeoutError:
            # The source may raise one, too.
            if limit.expired():
                raise self._deadline.error() from None
            raise
        return taken

    def _trace_many(self, items: list[dict[str, Any]]) -> AsyncGenerator[Any, None]:
        run = TraceManyRun(
            self._connection,
            items,
            self._arguments,
            priority=self._priority,
            deadline=self._deadline,
            pins=self._pins,
        )
        return iterate(run, Progress(items, shown=False))

    def _fail(self, prompt: Prompt, error: TraceError) -> None:
        if prompt.number not in self._failures:
            self._failures[prompt.number] = failure = Failure(prompt.id, error)
            self._done(failure)

    async def _measured(self, prompts: Sequence[Prompt], token_id: int | None) -> list[Curves]:
        """Return the measured curves of those prompts that did not fail."""
        by_number = await self._trace(prompts)
        items: list[dict[str, Any]] = []
        jobs: list[tuple[int, tuple[int, ...]]] = []
        for number, curves in by_number.items():
            for off in curves.required():
                items.append({"id": len(jobs), **curves.item(off, token_id)})
                jobs.append((number, off))
        left = Counter(number for number, _ in jobs)
        async with aclosing(self._trace_many(items)) as results:
            async for result in results:
                number, off = jobs[result.id]
                left[number] -= 1
                if isinstance(result, Failure):
                    self._fail(by_number[number].prompt, result.reason)
                else:
                    by_number[number].record(off, result.target.logit)
                if not left[number] and number not in self._failures:
                    self._done(None)
        return [curves for number, curves in by_number.items() if number not in self._failures]

    async def _trace(self, prompts: Sequence[Prompt]) -> dict[int, Curves]:
        """Trace prompts by all rules; return their curves, not measured yet, by number."""
        site = self._settings.site
        reduce = "token" if site == "embed" else "feature"
        jobs = [(prompt, rule) for prompt in prompts for rule in self._rules]
        items = [
            {**prompt.item, "id": number, "rule": rule, "sites": (site,), "reduce": reduce}
            for number, (prompt, rule) in enumerate(jobs)
        ]
        traces: dict[int, dict[str, Trace]] = {prompt.number: {} for prompt in prompts}
        async with aclosing(self._trace_many(items)) as results:
            async for result in results:
                prompt, rule = jobs[result.id]
                if isinstance(result, Failure):
                    _raise_if_shared(result.reason, prompt)
                    self._fail(prompt, result.reason)
                else:
                    traces[prompt.number][rule] = result
        found = {}
        for prompt in prompts:
            if prompt.number in self._failures:
                continue
            by_rule = {rule: traces[prompt.number][rule] for rule in self._rules}
            try:
                found[prompt.number] = Curves.of(prompt, by_rule, self._settings)
            except TraceError as error:
                self._fail(prompt, error)
        return found

    async def _replacement(self) -> tuple[str, int | None]:
        """Return what replaces tokens, and its id if it is a token.

        Raises TraceError if the model has no such token.
        """
        token = self._settings.token
        if token is None:
            return str(self._settings.replace), None
        # A worker resolves it as the target of a prompt of one token. The position keeps the error
        # for a longer text from proposing a continuation.
        asked = {"input_ids": [0], "target": Target(token, position=0), "sites": ()}
        (found,) = [result async for result in self._trace_many([asked])]
        if isinstance(found, Failure):
            _raise_with(found.reason, [
                Violation("replace", fault.description)
                if fault.field.startswith("target")
                else fault
                for fault in found.reason.violations
            ])  # fmt: skip
            raise found.reason
        return found.target.token, found.target.token_id


def _raise_if_shared(error: TraceError, prompt: Prompt) -> None:
    """Raise the faults of an error that all prompts would have."""
    shared = []
    for violation in error.violations:
        name = violation.field.partition("[")[0]
        if name in _SHARED:
            shared.append(Violation(_SHARED[name], violation.description))
        # A token depends on the model alone; a position or a continuation on the prompt.
        elif name in _SHARED_TARGET and "target" not in prompt.item:
            shared.append(violation)
    _raise_with(error, shared)


def _raise_with(error: TraceError, violations: Sequence[Violation]) -> None:
    """Raise an error with other violations; does nothing without any."""
    if violations:
        message = "; ".join(map(str, violations))
        raise type(error)(message, violations=violations, job_id=error.job_id)
