"""Generation of several jobs: in parts where memory or a failure makes it necessary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, outcomes, prepare
from reference.peak import peak_bytes
from reltrace_worker.engine import Engine
from reltrace_worker.engine.decoding import DecodeBatch, GeneratedSequence
from reltrace_worker.engine.generation import Generation
from reltrace_worker.engine.memory import MemoryPlan
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.errors import DeviceLostError, EngineError, PassFailedError
from reltrace_worker.types.jobs import (
    GenerateJob,
    GenerateRequest,
    Sampling,
)
from reltrace_worker.types.results import JobResult

Outcomes = dict[int, JobResult | EngineError]


def jobs(loaded: LoadedModel, tokens: int = 20, **how: Any) -> list[GenerateJob]:
    """One job per prompt, drawn with a seed: what a text begins anew with is seen."""
    spec = Sampling(tokens, temperature=1.0, seed=5, **how)
    return prepare(loaded, *(GenerateRequest(prompt, spec) for prompt in PROMPTS))


def finished(texts: Generation, step: int = 4) -> Outcomes:
    found: Outcomes = {}
    while not texts.finished:
        texts.decode(step)
        found |= texts.take_outcomes()
    return found


def ids(outcome: JobResult | EngineError) -> tuple[int, ...]:
    assert isinstance(outcome, JobResult), outcome
    assert outcome.generated is not None
    return outcome.generated.token_ids


def alone(loaded: LoadedModel, batch: Sequence[GenerateJob]) -> list[tuple[int, ...]]:
    return [ids(finished(Generation(loaded, [job], lambda *_: None))[0]) for job in batch]


@pytest.fixture
def loaded(checkpoints: Checkpoints) -> LoadedModel:
    return checkpoints.loaded("grouped")


class Failing:
    """Lets passes fail, and notes how many texts and how many tokens of each they began with."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fault: Callable[[Sequence[GeneratedSequence]], Exception | None],
    ) -> None:
        self.begun: list[list[int]] = []
        self._fault = fault
        self._forward, self._init = DecodeBatch._logits, DecodeBatch.__init__
        monkeypatch.setattr(DecodeBatch, "_logits", lambda *given: self.logits(*given))
        monkeypatch.setattr(DecodeBatch, "__init__", lambda *given: self.begin(*given))

    def begin(
        self, decoding: DecodeBatch, loaded: LoadedModel, texts: Sequence[GeneratedSequence]
    ) -> None:
        self.begun.append([len(text.ids) for text in texts])
        self._init(decoding, loaded, texts)

    def logits(self, decoding: DecodeBatch, ids: torch.Tensor, past: int) -> torch.Tensor:
        if (error := self._fault(decoding.sequences)) is not None:
            raise error
        return self._forward(decoding, ids, past)


def test_texts_that_do_not_fit_are_written_in_halves(loaded: LoadedModel) -> None:
    batch = jobs(loaded)
    asked: list[int] = []

    def plan(some: Sequence[GenerateJob], _: int) -> EngineError | None:
        asked.append(len(some))
        return EngineError("too many") if len(some) > 2 else None

    found = finished(Generation(loaded, batch, plan))
    assert [ids(found[n]) for n in range(len(batch))] == alone(loaded, batch)
    assert asked[0] == len(batch)
    assert asked.count(2) + asked.count(1) >= len(batch) / 2


def test_a_text_that_does_not_fit_alone_has_the_plans_error(loaded: LoadedModel) -> None:
    batch = jobs(loaded)
    longest = max(batch, key=lambda job: len(job.token_ids))
    error = EngineError("one of them is too long")
    found = finished(Generation(loaded, batch, lambda some, _: error if longest in some else None))
    for number, job in enumerate(batch):
        assert (found[number] is error) == (job is longest)


def test_what_was_written_when_memory_ran_out_stays_written(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given texts that are read along with while they are written
    If memory runs out after some tokens
    I expect halves to go on behind those tokens, and the texts to be what they are alone.
    """
    batch = jobs(loaded)
    wanted = alone(loaded, batch)

    def fault(texts: Sequence[GeneratedSequence]) -> Exception | None:
        together = len(texts) == len(batch)
        return torch.OutOfMemoryError() if together and len(texts[0].ids) == 7 else None

    failing = Failing(monkeypatch, fault)
    found = finished(Generation(loaded, batch, lambda *_: None))
    assert [ids(found[n]) for n in range(len(batch))] == wanted
    begun = [count for texts in failing.begun for count in texts]
    assert begun == [0] * len(batch) + [7] * len(batch)


@pytest.mark.parametrize("error", [ValueError("no"), torch.OutOfMemoryError("no")])
def test_who_fails_alone_has_the_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    batch = jobs(loaded)
    wanted = alone(loaded, batch)
    Failing(monkeypatch, lambda texts: error if any(t.job is batch[3] for t in texts) else None)
    found = finished(Generation(loaded, batch, lambda *_: None))
    for number, one in enumerate(wanted):
        if number != 3:
            assert ids(found[number]) == one
    ended = found[3]
    assert isinstance(ended, EngineError)
    # An error of unknown cause may pass; want of memory stays.
    assert isinstance(ended, PassFailedError) == isinstance(error, ValueError)


def test_a_lost_device_is_nobodys_fault(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, lambda _: torch.AcceleratorError("illegal memory access"))
    engine = Engine(loaded, "off")
    texts = engine.begin(jobs(loaded))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        engine.advance(texts)


def test_a_text_is_handed_out_when_it_has_ended(loaded: LoadedModel) -> None:
    short, long = jobs(loaded, 2)[0], jobs(loaded, 40)[1]
    texts = Generation(loaded, [long, short], lambda *_: None)
    texts.decode(3)
    assert list(texts.take_outcomes()) == [1]
    assert texts.take_outcomes() == {}
    assert not texts.finished
    assert list(finished(texts)) == [0]


def test_what_nobody_waits_for_is_not_written_on(loaded: LoadedModel) -> None:
    texts = Generation(loaded, jobs(loaded)[2:4], lambda *_: None)
    texts.decode(2)
    dropped = texts._open[0]
    texts.cancel(0)
    assert list(finished(texts)) == [1]
    assert len(dropped.ids) == 2
    texts = Generation(loaded, jobs(loaded)[2:4], lambda *_: None)
    for job in (0, 1):
        texts.cancel(job)
    assert texts.finished


@pytest.mark.parametrize(
    ("lengths", "tokens", "temperature"),
    [
        # One long prompt, to which all others are padded.
        ((110, *[2] * 30), 4, 0.0),
        ((3,), 60, 0.0),
        ((60,) * 8, 60, 1.0),
        ((2,) * 40, 2, 1.0),
    ],
)
def test_the_plan_holds_what_texts_need(
    checkpoints: Checkpoints, lengths: tuple[int, ...], tokens: int, temperature: float
) -> None:
    loaded = checkpoints.loaded("deep")
    how = Sampling(tokens, temperature=temperature)
    batch = prepare(
        loaded,
        *(GenerateRequest(tuple(range(20, 20 + n)), how) for n in lengths),
    )
    need = MemoryPlan(loaded).generation_bytes(batch)

    def write() -> None:
        finished(Generation(loaded, batch, lambda *_: None))

    write()  # what stays is allocated
    peak = peak_bytes(loaded, write)
    assert peak <= need < 6 * peak


def test_want_of_memory_is_found_before_it_runs_out(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("deep")
    batch = jobs(loaded, 4)
    model = MemoryPlan(loaded)
    limit = max(model.generation_bytes([job]) for job in batch)
    assert model.generation_bytes(batch) > limit
    found = outcomes(Engine(loaded, memory_bytes=limit), batch)
    assert [ids(one) for one in found] == alone(loaded, batch)
    shortest = min(model.generation_bytes([job]) for job in batch)
    refused = [str(one) for one in outcomes(Engine(loaded, memory_bytes=shortest - 1), batch)]
    assert all(text.startswith("generating up to ") for text in refused)
    assert "tokens, prompts included, does not fit into memory: it needs" in refused[0]
