"""Runs an evaluation: traces, then forward passes with something switched off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from reltrace.calls.pinning import Pins
from reltrace.calls.source import Source, open_source
from reltrace.calls.trace_many import TraceManyRun
from reltrace.evaluation.curves import Curves
from reltrace.evaluation.evaluation import Evaluation
from reltrace.evaluation.plan import RANDOM, Plan
from reltrace.evaluation.prompts import Ids, Prompt, as_continuation, check_target
from reltrace.evaluation.tally import Tally
from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.types.errors import TraceError, Violation, invalid
from reltrace.types.failure import Failure
from reltrace.types.request import Arguments, Priority, wire_priority
from reltrace.types.target import Target
from reltrace.types.trace import Trace

_AT_ONCE = 64
"""Prompts whose traces and curves are held at a time."""

_SHARED = {"model": "model", "rule": "rules", "sites": "site", "reduce": "site"}
"""Fields of jobs that no prompt decides, and the arguments of `evaluate` that do."""

_SHARED_TARGET = ("target", "target.token", "target.contrast")


class Run:
    """One evaluation.

    Parameters
    ----------
    connection
        To the server.
    plan
        What and how.
    defaults
        Model and target of prompts that do not say otherwise.
    priority
        Of all jobs.
    deadline
        Of the whole.
    done
        Called once for each prompt that has come to its end, with its Failure or None.

    Raises
    ------
    InvalidArgument
        If something is wrong that all prompts share.
    """

    def __init__(
        self,
        connection: Connection,
        plan: Plan,
        defaults: Mapping[str, Any],
        priority: Priority,
        deadline: Deadline,
        done: Callable[[Failure | None], None],
    ) -> None:
        self._connection = connection
        self._pins = Pins(connection)
        self._plan = plan
        given = Arguments(**{key: value for key, value in defaults.items() if value is not None})
        check_target(given.target, "target")
        self._defaults = replace(given, target=as_continuation(given.target))
        self._defaults.check_shared()
        wire_priority(priority)
        self._priority = priority
        self._deadline = deadline
        self._done = done
        self._traced = [rule for rule in plan.rules if rule != RANDOM]
        self._failures: dict[int, Failure] = {}
        self._tally = Tally(plan)

    async def over(self, prompts: object) -> Evaluation:
        """Evaluate prompts, some dozens at a time.

        Raises
        ------
        InvalidArgument
            There are none; one is no prompt: of a list, before anything is run.
        TraceError
            Something is wrong with all of them, such as the model.
        """
        source = open_source(prompts, "prompts")
        if isinstance(prompts, list | tuple):
            every = Ids()
            for number, given in enumerate(prompts):
                every.add(Prompt.of(number, given))
        count, ids = 0, Ids()
        try:
            replacement = await self._replacement()
            while given := await self._next(source):
                some = [Prompt.of(number, one) for number, one in enumerate(given, count)]
                for prompt in some:
                    ids.add(prompt)
                count += len(some)
                for curves in await self._evaluated(some, replacement[1]):
                    self._tally.add(curves)
        finally:
            await source.close()
        if not count:
            raise invalid("prompts", "is empty")
        failed = {one.id: one.reason for _, one in sorted(self._failures.items())}
        return self._tally.evaluation(replacement, failed)

    async def _next(self, source: Source) -> list[Any]:
        """Return the next prompts; none: that was all."""
        some: list[Any] = []
        try:
            async with asyncio.timeout(self._deadline.remaining()) as limit:
                while len(some) < _AT_ONCE:
                    more = await source.take(_AT_ONCE - len(some), wait=True)
                    if more is None:
                        break
                    some += more
        except TimeoutError:
            # Ours, or the source's own.
            if limit.expired():
                raise self._deadline.error() from None
            raise
        return some

    async def _many(self, items: list[dict[str, Any]]) -> AsyncGenerator[Any, None]:
        run = TraceManyRun(
            self._connection,
            items,
            self._defaults,
            priority=self._priority,
            deadline=self._deadline,
            pins=self._pins,
        )
        try:
            while results := await run.take():
                for result in results:
                    yield result
        finally:
            await run.close()

    def _fail(self, prompt: Prompt, error: TraceError) -> None:
        if prompt.number not in self._failures:
            self._failures[prompt.number] = failure = Failure(prompt.id, error)
            self._done(failure)

    async def _evaluated(self, prompts: Sequence[Prompt], token_id: int | None) -> list[Curves]:
        by_number = await self._trace(prompts)
        items: list[dict[str, Any]] = []
        slots: list[tuple[int, tuple[int, ...]]] = []
        for number, curves in by_number.items():
            for off in curves.asked():
                items.append({"id": len(slots), **curves.item(off, token_id)})
                slots.append((number, off))
        left = Counter(number for number, _ in slots)
        async with aclosing(self._many(items)) as results:
            async for result in results:
                number, off = slots[result.id]
                left[number] -= 1
                if isinstance(result, Failure):
                    self._fail(by_number[number].prompt, result.reason)
                else:
                    by_number[number].note(off, result.target.logit)
                if not left[number] and number not in self._failures:
                    self._done(None)
        return [curves for number, curves in by_number.items() if number not in self._failures]

    async def _trace(self, prompts: Sequence[Prompt]) -> dict[int, Curves]:
        """Return the orders of those that could be traced, by number."""
        reduce = "token" if self._plan.site == "embed" else "feature"
        items = [
            {
                **prompt.item,
                "id": place * len(self._traced) + which,
                "rule": rule,
                "sites": (self._plan.site,),
                "reduce": reduce,
            }
            for place, prompt in enumerate(prompts)
            for which, rule in enumerate(self._traced)
        ]
        traces: list[dict[str, Trace]] = [{} for _ in prompts]
        async with aclosing(self._many(items)) as results:
            async for result in results:
                place, which = divmod(result.id, len(self._traced))
                if isinstance(result, Failure):
                    _raise_if_shared(result.reason, prompts[place])
                    self._fail(prompts[place], result.reason)
                else:
                    traces[place][self._traced[which]] = result
        found = {}
        for prompt, of_prompt in zip(prompts, traces, strict=True):
            if len(of_prompt) < len(self._traced):
                continue
            by_rule = {rule: of_prompt[rule] for rule in self._traced}
            try:
                found[prompt.number] = Curves.of(prompt, by_rule, self._plan)
            except TraceError as error:
                self._fail(prompt, error)
        return found

    async def _replacement(self) -> tuple[str, int | None]:
        """Return what takes the place of tokens, and its id if it is a token.

        Raises
        ------
        TraceError
            The model has no such token.
        """
        token = self._plan.token
        if token is None:
            return str(self._plan.replace), None
        # A worker looks it up as a target; what it computes beside is a pass over one token. With
        # a position there is no continuation, which the error of a longer text would propose.
        asked = {"input_ids": [0], "target": Target(token, position=0), "sites": ()}
        (found,) = [result async for result in self._many([asked])]
        if isinstance(found, Failure):
            faults = [
                Violation("replace", fault.description)
                if fault.field.startswith("target")
                else fault
                for fault in found.reason.violations
            ]
            _raise_with(found.reason, faults)
            raise found.reason
        return found.target.token, found.target.token_id


def _raise_if_shared(error: TraceError, prompt: Prompt) -> None:
    """Raise an error that is no prompt's own: every other one would have it, too."""
    shared = []
    for violation in error.violations:
        name = violation.field.partition("[")[0]
        if name in _SHARED:
            shared.append(Violation(_SHARED[name], violation.description))
        # Which tokens there are, the model decides; which positions, and how a text goes on, the
        # prompt.
        elif name in _SHARED_TARGET and "target" not in prompt.item:
            shared.append(violation)
    _raise_with(error, shared)


def _raise_with(error: TraceError, violations: Sequence[Violation]) -> None:
    """Raise an error with other violations, if there are any."""
    if violations:
        message = "; ".join(map(str, violations))
        raise type(error)(message, violations=violations, job_id=error.job_id)
