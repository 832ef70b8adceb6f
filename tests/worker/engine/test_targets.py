"""What the backward pass starts from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.lrp import RULES
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import TargetRequest, TraceJob, TraceRequest
from reltrace_worker.types.results import JobResult, Outcome

PROMPT = PROMPTS[0]


def trace(checkpoints: Checkpoints, *targets: TargetRequest, **fields: Any) -> JobResult:
    loaded = checkpoints.loaded("grouped")
    return run(Engine(loaded), prepare(loaded, TraceRequest(PROMPT, targets=targets, **fields)))[0]


def assert_equal(left: torch.Tensor, right: torch.Tensor) -> None:
    assert float((left - right).abs().max() / right.abs().max()) < 1e-5


def logits(checkpoints: Checkpoints, token_ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        loaded = checkpoints.loaded("grouped")
        return loaded.model(torch.tensor([token_ids], device=loaded.device)).logits[0]


def test_the_default_is_the_largest_logit_at_the_last_position(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    (job,) = prepare(loaded, TraceRequest(PROMPT))
    wanted = logits(checkpoints, job.token_ids)[-1]
    (target,) = trace(checkpoints, TargetRequest()).targets
    assert target.token_id == int(wanted.argmax())
    assert target.logit == pytest.approx(float(wanted.max()), rel=1e-5)
    assert target.target.terms[0].position == len(job.token_ids) - 1
    assert (target.target.contrast_id, target.contrast, target.target.logprob) == (None, "", False)
    assert target.target.continuation_ids == ()


def test_a_token_by_text_and_by_id_is_the_same(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    token_id = loaded.tokenizer.convert_tokens_to_ids("Ġdogs")
    result = trace(checkpoints, TargetRequest(token=" dogs"), TargetRequest(token=token_id))
    text, number = result.targets
    assert text == number
    assert (text.token, text.token_id) == (" dogs", token_id)
    assert torch.equal(result.tensors[0].values, result.tensors[1].values)


@pytest.mark.parametrize("rule", RULES)
def test_several_targets_equal_single_ones(checkpoints: Checkpoints, rule: str) -> None:
    targets = (
        TargetRequest(),
        TargetRequest(token=4),
        TargetRequest(position=3),
        TargetRequest(logprob=True),
    )
    together = trace(checkpoints, *targets, rule=rule)
    for index, target in enumerate(targets):
        alone = trace(checkpoints, target, rule=rule)
        ours, wanted = together.targets[index], alone.targets[0]
        # The logits of other rows change how the product with the head is blocked: one bit.
        assert ours.logit == pytest.approx(wanted.logit, rel=1e-6)
        numbers = {
            "logit": wanted.logit,
            "token_logit": wanted.token_logit,
            "candidates": wanted.candidates,
        }
        assert replace(ours, **numbers) == wanted
        assert [c.token_id for c in ours.candidates] == [c.token_id for c in wanted.candidates]
        values, reference = together.tensors[index].values, alone.tensors[0].values
        assert float((values - reference).abs().max() / reference.abs().max()) < 1e-5


def test_a_position_is_the_prompt_cut_there(checkpoints: Checkpoints) -> None:
    """Given causal attention, I expect nothing of what follows the position to matter."""
    loaded = checkpoints.loaded("grouped")
    ids = tuple(range(20, 40))
    whole, counted, cut = run(
        Engine(loaded),
        prepare(
            loaded,
            TraceRequest(ids, targets=(TargetRequest(position=7),)),
            TraceRequest(ids, targets=(TargetRequest(position=-13),)),
            TraceRequest(ids[:8]),
        ),
    )
    assert counted.targets[0] == replace(
        whole.targets[0], logit=pytest.approx(whole.targets[0].logit, rel=1e-6)
    )
    assert whole.targets[0].token_id == cut.targets[0].token_id
    values = whole.tensors[0].values
    assert_equal(values[:, :8], cut.tensors[0].values)
    assert float(values[:, 8:].abs().max()) == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_a_contrast_is_the_difference_of_two_targets(checkpoints: Checkpoints, rule: str) -> None:
    targets = (TargetRequest(token=5), TargetRequest(token=9), TargetRequest(token=5, contrast=9))
    result = trace(checkpoints, *targets, rule=rule)
    left, right, difference = result.targets
    assert difference.logit == pytest.approx(left.logit - right.logit, abs=1e-5)
    assert (difference.token_id, difference.target.contrast_id) == (5, 9)
    assert difference.contrast == right.token
    values = [tensor.values for tensor in result.tensors]
    assert_equal(values[2], values[0] - values[1])


def test_a_contrast_does_not_know_log_probabilities(checkpoints: Checkpoints) -> None:
    """The normalizer of log-probabilities falls out of a difference."""
    logit, logprob = (TargetRequest(token=5, contrast=9, logprob=flag) for flag in (False, True))
    result = trace(checkpoints, logit, logprob)
    assert result.targets[0].logit == pytest.approx(result.targets[1].logit, abs=1e-4)
    assert_equal(result.tensors[1].values, result.tensors[0].values)


def test_a_log_probability_is_that_of_plain_autograd(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    (job,) = prepare(loaded, TraceRequest(PROMPT))
    table = loaded.model.get_input_embeddings()
    embeddings = table(torch.tensor([job.token_ids], device=loaded.device)).requires_grad_()
    scores = loaded.model(inputs_embeds=embeddings).logits[0, -1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(scores[5], embeddings)
    target = TargetRequest(token=5, logprob=True)
    result = trace(checkpoints, target, rule="gradient", sites=("embed",), reduction="full")
    assert result.targets[0].target.logprob
    assert result.targets[0].logit == pytest.approx(float(scores[5].detach()), rel=1e-5)
    assert_equal(result.tensors[0].values, (embeddings * gradient).detach()[0].cpu())


@pytest.mark.parametrize("logprob", [False, True])
def test_a_continuation_is_the_sum_of_its_tokens(checkpoints: Checkpoints, logprob: bool) -> None:
    loaded = checkpoints.loaded("grouped")
    response = (30, 41, 52)
    (bare,) = prepare(loaded, TraceRequest(PROMPT))
    result = trace(
        checkpoints,
        TargetRequest(continuation=response, logprob=logprob),
        TargetRequest(continuation=response, each=True, logprob=logprob),
        TargetRequest(token=30, logprob=logprob),
    )
    total, *each, first = result.targets
    assert total.target.continuation_ids == response
    assert [target.target.continuation_ids for target in each] == [(30,), (41,), (52,)]
    last = len(bare.token_ids) - 1
    assert [target.target.terms[0].position for target in (total, *each)] == [
        last,
        last,
        last + 1,
        last + 2,
    ]
    assert total.logit == pytest.approx(sum(target.logit for target in each), rel=1e-5)
    values = [tensor.values for tensor in result.tensors]
    assert values[0].shape[-1] == len(bare.token_ids) + 2
    assert_equal(values[0], values[1] + values[2] + values[3])
    # The first response token's logit stands at the end of the prompt: a position counts there.
    assert (first.token_id, first.target.terms[0].position) == (
        each[0].token_id,
        each[0].target.terms[0].position,
    )
    assert_equal(values[4], values[1])
    scores = logits(checkpoints, (*bare.token_ids, *response[:-1]))
    if logprob:
        scores = scores.log_softmax(-1)
    wanted = [float(scores[last + i, token]) for i, token in enumerate(response)]
    assert [target.logit for target in each] == pytest.approx(wanted, rel=1e-4)


def test_a_continuation_by_text_names_its_tokens(checkpoints: Checkpoints) -> None:
    (target,) = trace(checkpoints, TargetRequest(continuation=" dogs and cats")).targets
    assert target.token == " dogs and cats"
    assert len(target.target.continuation_ids) == 3


def test_a_contrast_that_is_the_largest_logit_itself_is_the_jobs_fault(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference is zero, and so would all relevance be."""
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    (plain,) = run(engine, prepare(loaded, TraceRequest(PROMPTS[0])))
    largest = plain.targets[0].token_id
    specs = [
        TraceRequest(PROMPTS[0], targets=(TargetRequest(token=3), TargetRequest(contrast=contrast)))
        for contrast in (largest, largest + 1)
    ]
    batches = []
    run_batch = engine._run_batch

    def counted(jobs: list[TraceJob], *mode: Any) -> list[Outcome]:
        batches.append(len(jobs))
        return run_batch(jobs, *mode)

    monkeypatch.setattr(engine, "_run_batch", counted)
    zero, other = engine.run(prepare(loaded, *specs))
    assert isinstance(zero, InvalidJob)
    (fault,) = zero.violations
    assert fault.field == "targets[1].contrast"
    assert "is the token with the largest logit at position" in fault.description
    assert isinstance(other, JobResult)
    # The job is at fault, not a neighbour: it does not run again.
    assert batches == [4]


def test_candidates_are_the_likeliest_tokens_at_each_targets_position(
    checkpoints: Checkpoints,
) -> None:
    targets = (
        TargetRequest(),
        TargetRequest(token=4, position=2, contrast=5, logprob=True),
        TargetRequest(continuation=" dogs and cats"),
        TargetRequest(continuation=" dogs and cats", each=True),
    )
    result = trace(checkpoints, *targets, sites=())
    loaded = checkpoints.loaded("grouped")
    (job,) = prepare(loaded, TraceRequest(PROMPT, targets=targets))
    wanted = logits(checkpoints, job.token_ids).double()
    assert len(result.targets) == 3 + len(job.targets[2].terms)
    for target in result.targets:
        row = wanted[target.target.terms[0].position]
        top, ids = row.topk(10)
        assert [found.token_id for found in target.candidates] == ids.tolist()
        assert [found.logit for found in target.candidates] == pytest.approx(top.tolist(), rel=1e-5)
        shares = row.softmax(-1)[ids].tolist()
        assert [found.probability for found in target.candidates] == pytest.approx(shares, rel=1e-4)
        for found in target.candidates:
            assert found.token == Vocabulary(loaded.tokenizer).text(found.token_id)
    # Of tokens that are equally likely the first, as the target itself is chosen.
    assert result.targets[0].candidates[0].token_id == result.targets[0].token_id


def test_many_rows_of_candidates_are_those_of_one(checkpoints: Checkpoints) -> None:
    targets = tuple(TargetRequest(position=place) for place in range(19))
    together = trace(checkpoints, *targets, sites=())
    for target, found in zip(targets, together.targets, strict=True):
        (alone,) = trace(checkpoints, target, sites=()).targets
        assert [c.token_id for c in found.candidates] == [c.token_id for c in alone.candidates]


def test_a_much_likelier_twin_of_a_target_is_named(checkpoints: Checkpoints) -> None:
    """
    Every token that there is with a space before it and without is asked for: not both of them at
    one position, where a reader knows of both.
    """
    loaded = checkpoints.loaded("grouped")
    vocabulary = Vocabulary(loaded.tokenizer)
    names = vocabulary.texts(range(loaded.shape.vocab_size))
    pairs = [(name, f" {name}") for name in names if f" {name}" in names]
    hinted = 0
    for place in (2, 9, 18):
        row = logits(checkpoints, prepare(loaded, TraceRequest(PROMPT))[0].token_ids)[place]
        likely = set(row.topk(10).indices.tolist())
        for ordered in (pairs, [pair[::-1] for pair in pairs]):
            expected = []
            for one, other in ordered:
                asked, twin = names.index(one), names.index(other)
                if twin in likely and row[twin] - row[asked] > math.log(10):
                    expected.append(
                        f"The target {one!r} has the logit {float(row[asked]):.2f}; {other!r}, "
                        f"which is another token, has {float(row[twin]):.2f} at the same position."
                    )
            alone = [TargetRequest(token=one, position=place) for one, _ in ordered]
            elsewhere = [TargetRequest(token=other, position=place - 1) for _, other in ordered]
            beside = [TargetRequest(token=other, position=place) for _, other in ordered]
            result = trace(checkpoints, *alone, sites=())
            assert list(result.hints) == expected
            result = trace(checkpoints, *alone, *elsewhere, sites=())
            assert set(result.hints) >= set(expected)
            result = trace(checkpoints, *alone, *beside, sites=())
            assert result.hints == ()
            hinted += len(expected)
    assert hinted > 0
