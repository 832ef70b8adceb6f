"""Texts that join others and leave them: what is generated is what each of them is alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare
from reference.real_models import RealModels
from reltrace_worker.demo import path as demo_path
from reltrace_worker.engine import decoding, generation
from reltrace_worker.engine.decoding import DecodeBatch
from reltrace_worker.engine.generation import Generation
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.types.errors import EngineError, PassFailedError
from reltrace_worker.types.jobs import Edit, GenerateJob, GenerateRequest, Sampling
from reltrace_worker.types.results import GeneratedText, JobResult, Outcome

Texts = list[GeneratedText]


def text_of(outcome: Outcome) -> GeneratedText:
    assert isinstance(outcome, JobResult), outcome
    assert outcome.generated is not None
    return outcome.generated


def joined(loaded: LoadedModel, batch: Sequence[GenerateJob], seed: int) -> list[Outcome]:
    """Generate all texts, each of which joins after a random number of steps."""
    chosen = random.Random(seed)
    task = Generation(loaded, batch[:1], lambda *_: None)
    found: dict[int, Outcome] = {}
    for job in batch[1:]:
        for _ in range(chosen.randrange(4)):
            task.decode(1)
            found |= task.take_outcomes()
        assert task.join(job) is not None
    while not task.finished:
        task.decode(chosen.randrange(1, 9))
        found |= task.take_outcomes()
    return [found[number] for number in range(len(batch))]


def generated_by_transformers(
    loaded: LoadedModel, job: GenerateJob
) -> tuple[list[int], list[float]]:
    """Return the tokens of `generate`, one prompt at a time, and their log-probabilities."""
    ids = torch.tensor([job.token_ids], device=loaded.device)
    found = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = found.sequences[0, ids.shape[1] :].tolist()
    rows = [row[0].float().log_softmax(-1) for row in found.logits]
    return tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)]


def compare(loaded: LoadedModel, batch: Sequence[GenerateJob], seed: int) -> None:
    for job, outcome in zip(batch, joined(loaded, batch, seed), strict=True):
        tokens, logprobs = generated_by_transformers(loaded, job)
        ours = text_of(outcome)
        assert list(ours.token_ids) == tokens
        assert ours.logprobs == pytest.approx(logprobs, abs=2e-4)


def jobs(
    loaded: LoadedModel, prompts: Sequence[str | tuple[int, ...]], seed: int
) -> list[GenerateJob]:
    lengths = random.Random(seed)
    return prepare(
        loaded, *(GenerateRequest(prompt, Sampling(lengths.randrange(1, 25))) for prompt in prompts)
    )


@pytest.mark.parametrize("recipe", ["grouped", "llama3_rope", *FAMILY_RECIPES])
@pytest.mark.parametrize("chunk", [512, 9])
def test_texts_that_join_are_those_of_transformers(
    checkpoints: Checkpoints, recipe: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given texts of different lengths, which begin while others are generated
    If their prompts are read whole, or some tokens at a time
    I expect the tokens of `generate` for each prompt alone, and their log-probabilities.
    """
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", chunk)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", chunk)
    loaded = checkpoints.loaded(recipe)
    # transformers keeps the keys of longrope's short frequencies beyond their limit.
    prompts = [p for p in PROMPTS if recipe != "phi3" or len(p) < 12]
    compare(loaded, jobs(loaded, prompts, chunk), chunk)


def test_texts_of_the_demo_model_that_join() -> None:
    loaded = load_model(str(demo_path()), device="cpu")
    compare(loaded, jobs(loaded, [p for p in PROMPTS if isinstance(p, str)] * 2, 3), 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_texts_of_a_real_model_that_join(real_models: RealModels) -> None:
    loaded = real_models.loaded("smollm2")
    compare(loaded, jobs(loaded, [p for p in PROMPTS if isinstance(p, str)] * 2, 3), 3)


def test_draws_and_edits_of_texts_that_join_are_their_own(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("gemma3")
    edits = (Edit("neuron", 1, (3, 5), scale=0.0, value=6.0), Edit("resid", 2, positions=(-1,)))
    batch = [
        replace(
            job,
            sampling=Sampling(job.sampling.max_new_tokens, temperature=1.0, top_p=0.9, seed=number),
            edits=edits[number % 3 : number % 3 + 1],
        )
        for number, job in enumerate(jobs(loaded, PROMPTS, 5))
    ]
    for job, outcome in zip(batch, joined(loaded, batch, 6), strict=True):
        (alone,) = joined(loaded, [job], 0)
        assert text_of(outcome).token_ids == text_of(alone).token_ids


def test_a_text_that_joins_reaches_the_limit_of_longrope(checkpoints: Checkpoints) -> None:
    """Each text begins anew at its own time; the others go on with the keys that they have."""
    loaded = checkpoints.loaded("phi3")
    prompts = [tuple(range(20, 20 + length)) for length in (36, 12, 33, 38, 41)]
    batch = prepare(loaded, *(GenerateRequest(prompt, Sampling(12)) for prompt in prompts))
    for job, outcome in zip(batch, joined(loaded, batch, 7), strict=True):
        (alone,) = joined(loaded, [job], 0)
        assert text_of(outcome).token_ids == text_of(alone).token_ids
        assert text_of(outcome).logprobs == pytest.approx(text_of(alone).logprobs, abs=2e-4)


def test_who_has_no_room_waits_and_nobody_who_comes_later_passes(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("plain")
    first, second, third = jobs(loaded, PROMPTS[:3], 1)
    held: list[int] = []

    def fault(some: Sequence[GenerateJob], bytes_held: int) -> EngineError | None:
        held.append(bytes_held)
        return EngineError("no room") if len(some) > 2 else None

    task = Generation(loaded, [first], fault)
    task.decode(1)
    assert task.join(second) == 1
    assert task.join(third) is None
    # What is allocated for those that run is not asked for again.
    assert held[0] == 0
    assert min(held[1:]) > 0


def test_what_fails_while_it_joins_fails_alone(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a text that runs, and two that join it, one of which fails every pass that it is in
    I expect the one that runs not to begin anew, and the faulty one alone to fail.
    """
    loaded = checkpoints.loaded("plain")
    batch = prepare(loaded, *(GenerateRequest(prompt, Sampling(30)) for prompt in PROMPTS[:3]))
    wanted = [text_of(joined(loaded, [job], 0)[0]).token_ids for job in batch[:2]]
    read: list[GenerateJob] = []
    forward = DecodeBatch._logits

    def failing(decoding: DecodeBatch, ids: torch.Tensor, past: int) -> torch.Tensor:
        if any(sequence.job is batch[2] for sequence in decoding.sequences):
            raise ValueError("no")
        read.extend(sequence.job for sequence in decoding.sequences if decoding.reads)
        return forward(decoding, ids, past)

    monkeypatch.setattr(DecodeBatch, "_logits", failing)
    task = Generation(loaded, batch[:1], lambda *_: None)
    task.decode(3)
    assert [task.join(job) for job in batch[1:]] == [1, 2]
    found: dict[int, Outcome] = {}
    while not task.finished:
        task.decode(5)
        found |= task.take_outcomes()
    assert [text_of(found[number]).token_ids for number in (0, 1)] == wanted
    assert isinstance(found[2], PassFailedError)
    assert read == batch[:2]


def test_long_prompts_are_read_beside_the_texts_that_run(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a text that runs, and a prompt of 64 tokens that is read 16 tokens at a time
    If another text of one token comes
    I expect the one that runs to go on by a token at each step, and the short one's token at its
    second: it takes turns with the long prompt.
    """
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 16)
    loaded = checkpoints.loaded("plain")
    runs, reads = prepare(
        loaded, *(GenerateRequest(prompt, Sampling(30)) for prompt in (PROMPTS[3], PROMPTS[5]))
    )
    (short,) = prepare(loaded, GenerateRequest(PROMPTS[4], Sampling(1)))
    task = Generation(loaded, [runs], lambda *_: None)
    task.decode(1)
    task.join(reads)
    task.decode(1)
    task.join(short)
    assert task.decode(10) == 2
    assert list(task.take_outcomes()) == [2]
    assert (len(task.token_ids(0)), len(task.token_ids(1))) == (4, 0)
    task.decode(1)
    assert (len(task.token_ids(0)), len(task.token_ids(1))) == (5, 1)
