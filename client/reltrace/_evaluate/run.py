"""Runs an evaluation: traces, then forward passes with something switched off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reltrace._edit import Edit
from reltrace._errors import TraceError, Violation, invalid
from reltrace._evaluate.evaluation import Evaluation, RuleScore
from reltrace._evaluate.plan import RANDOM, Plan
from reltrace._evaluate.prompts import Ids, Prompt, check_target
from reltrace._evaluate.scores import Floats, Mean, area, on_axis, strongest_first, tokens_at
from reltrace._failure import Failure
from reltrace._pinning import Pins
from reltrace._request import Arguments, Priority, wire_priority
from reltrace._source import Source, open_source
from reltrace._target import Target
from reltrace._trace import Trace
from reltrace._transport.connection import Deadline

if TYPE_CHECKING:
    from reltrace._aio import AsyncClient

_AT_ONCE = 64
"""Prompts whose traces and curves are held at a time."""

_SHARED = {"model": "model", "rule": "rules", "sites": "site", "reduce": "site"}
"""Fields of jobs that no prompt decides, and the arguments of `evaluate` that do."""


@dataclass(slots=True)
class _Curves:
    """What one prompt's target is with this or that switched off."""

    prompt: Prompt
    traces: dict[str, Trace]
    orders: dict[str, NDArray[np.int64]]
    at: Floats
    located: dict[str, tuple[float, float]]
    """By rule: whether the answer is strongest, and the share of positive relevance on it."""
    values: dict[tuple[int, ...], float] = field(default_factory=dict)
    """The target by what is switched off, as rising indices."""

    @property
    def trace(self) -> Trace:
        return next(iter(self.traces.values()))

    def off(self, site: str) -> Iterator[tuple[str, bool, int, tuple[int, ...]]]:
        """Yield (rule, most relevant first, point, indices that are switched off)."""
        for rule, order in self.orders.items():
            for most in (True, False):
                turned = order if most else order[::-1]
                for point, where in enumerate(self.at):
                    count = tokens_at(where, len(order)) if site == "embed" else int(where)
                    yield rule, most, point, tuple(sorted(turned[:count].tolist()))


class Run:
    """One evaluation.

    Parameters
    ----------
    client
        Whose traces.
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
        client: AsyncClient,
        plan: Plan,
        defaults: Mapping[str, Any],
        priority: Priority,
        deadline: Deadline,
        done: Callable[[Failure | None], None],
    ) -> None:
        self._client = client
        self._pins = Pins(client._connection)
        self._plan = plan
        self._defaults = Arguments(
            **{key: value for key, value in defaults.items() if value is not None}
        )
        check_target(self._defaults.target, "target")
        self._defaults.check_shared()
        wire_priority(priority)
        self._priority = priority
        self._deadline = deadline
        self._done = done
        self._traced = [rule for rule in plan.rules if rule != RANDOM]
        self._failures: dict[int, Failure] = {}
        self._areas: dict[str, list[float]] = {rule: [] for rule in plan.rules}
        self._sums: dict[tuple[str, bool], Floats] = {}
        self._located: dict[str, list[tuple[float, float]]] = {rule: [] for rule in plan.rules}
        self._count = 0
        self._model = ""
        self._at: Floats = np.zeros(0)

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
            while given := await self._next(source):
                some = [Prompt.of(number, one) for number, one in enumerate(given, count)]
                for prompt in some:
                    ids.add(prompt)
                count += len(some)
                for curves in await self._evaluated(some):
                    self._add(curves)
        finally:
            await source.close()
        if not count:
            raise invalid("prompts", "is empty")
        rules = {rule: self._score(rule) for rule in self._plan.rules}
        failed = {one.id: one.reason for _, one in sorted(self._failures.items())}
        return Evaluation(self._model, self._plan.site, self._count, self._at, rules, failed)

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
        run = self._client.start_many(
            items,
            self._defaults,
            ordered=False,
            max_in_flight=1024,
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

    async def _evaluated(self, prompts: Sequence[Prompt]) -> list[_Curves]:
        by_number = await self._trace(prompts)
        items, slots = [], []
        for number, curves in by_number.items():
            target = _same_target(curves.trace)
            for off in dict.fromkeys(off for *_, off in curves.off(self._plan.site)):
                slots.append((number, off))
                items.append(
                    {
                        "id": len(slots) - 1,
                        "input_ids": curves.trace.token_ids,
                        "target": target,
                        "sites": (),
                        "edits": self._edits(off, curves.trace),
                    }
                )
        left = Counter(number for number, _ in slots)
        async with aclosing(self._many(items)) as results:
            async for result in results:
                number, off = slots[result.id]
                left[number] -= 1
                if isinstance(result, Failure):
                    self._fail(by_number[number].prompt, result.reason)
                else:
                    by_number[number].values[off] = result.target.logit
                if not left[number] and number not in self._failures:
                    self._done(None)
        return [curves for number, curves in by_number.items() if number not in self._failures]

    async def _trace(self, prompts: Sequence[Prompt]) -> dict[int, _Curves]:
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
            try:
                found[prompt.number] = self._curves(prompt, of_prompt)
            except TraceError as error:
                self._fail(prompt, error)
        return found

    def _curves(self, prompt: Prompt, by_rule: dict[str, Trace]) -> _Curves:
        traces = {rule: by_rule[rule] for rule in self._traced}
        scores = {rule: t[self._plan.site].astype(np.float64).ravel() for rule, t in traces.items()}
        length = len(next(iter(scores.values())))
        if RANDOM in self._plan.rules:
            # Whichever prompts come beside it: its own order.
            seed = [self._plan.seed, *next(iter(traces.values())).token_ids]
            scores[RANDOM] = np.random.default_rng(seed).standard_normal(length)
        located = {}
        if prompt.answer is not None and self._plan.site == "embed":
            where = prompt.where(next(iter(traces.values())))
            located = {rule: _located(where, values) for rule, values in scores.items()}
        orders = {rule: strongest_first(scores[rule]) for rule in self._plan.rules}
        return _Curves(prompt, traces, orders, self._plan.at(length), located)

    def _edits(self, off: tuple[int, ...], trace: Trace) -> list[Edit]:
        if not off:
            return []
        if self._plan.site == "embed":
            return [Edit("embed", positions=off, scale=0.0)]
        width = trace["neuron"].shape[-1]
        layers: dict[int, list[int]] = {}
        for index in off:
            layer, neuron = divmod(index, width)
            layers.setdefault(trace.layers[layer], []).append(neuron)
        return [Edit("neuron", layer, neurons, scale=0.0) for layer, neurons in layers.items()]

    def _add(self, curves: _Curves) -> None:
        self._count += 1
        self._at, self._model = curves.at, curves.trace.provenance.model
        found = {
            (rule, most): np.zeros(len(curves.at))
            for rule in self._plan.rules
            for most in (True, False)
        }
        for rule, most, point, off in curves.off(self._plan.site):
            found[rule, most][point] = curves.values[off]
        for key, values in found.items():
            self._sums[key] = self._sums.get(key, np.zeros(len(values))) + values
        axis = on_axis(self._plan.site, curves.at)
        for rule in self._plan.rules:
            self._areas[rule].append(area(found[rule, True], found[rule, False], axis))
        for rule, located in curves.located.items():
            self._located[rule].append(located)

    def _score(self, rule: str) -> RuleScore:
        empty = np.zeros(0)
        most, least = (
            self._sums[rule, first] / self._count if self._count else empty
            for first in (True, False)
        )
        located = self._located[rule]
        return RuleScore(
            area=Mean.of(self._areas[rule]),
            most=most,
            least=least,
            hit=Mean.of([hit for hit, _ in located]) if located else None,
            mass=Mean.of([mass for _, mass in located]) if located else None,
        )


def _raise_if_shared(error: TraceError, prompt: Prompt) -> None:
    """Raise an error that is no prompt's own: every other one would have it, too."""
    shared = []
    for violation in error.violations:
        name = violation.field.partition("[")[0]
        if name in _SHARED:
            shared.append(Violation(_SHARED[name], violation.description))
        # Which tokens there are, the model decides; which positions, the prompt.
        elif (
            name.partition(".")[0] == "target"
            and name != "target.position"
            and "target" not in prompt.item
        ):
            shared.append(violation)
    if shared:
        message = "; ".join(map(str, shared))
        raise type(error)(message, violations=shared, job_id=error.job_id)


def _located(answer: Sequence[int], values: Floats) -> tuple[float, float]:
    """Return whether the answer is strongest, and the share of positive relevance on it."""
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    share = float(positive[list(answer)].sum() / total) if total else 0.0
    return float(int(values.argmax()) in answer), share


def _same_target(trace: Trace) -> Target:
    """Return the target that a trace resolved, so that it stays when something is switched off."""
    target = trace.target
    return Target(target.token_id, target.position, target.contrast_id, logprob=target.logprob)
