"""DecodeBatch tokens, against `generate` of transformers, and with edits."""

from __future__ import annotations

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, outcomes, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.engine.decoding import DecodeBatch, sample
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.errors import EngineError, InvalidJob
from reltrace_worker.types.jobs import (
    Edit,
    GenerateJob,
    GenerateRequest,
    Sampling,
    TargetRequest,
    TraceRequest,
)
from reltrace_worker.types.results import GeneratedText, JobResult
from transformers import AutoModelForCausalLM

RECIPES = ["grouped", "tied", "llama3_rope", "deep", *FAMILY_RECIPES]


def jobs(loaded: LoadedModel, *edits: Edit, **how: float) -> list[GenerateJob]:
    spec = Sampling(**{"max_new_tokens": 12, **how})  # type: ignore[arg-type]
    return prepare(loaded, *(GenerateRequest(p, spec, edits) for p in PROMPTS))


def written(loaded: LoadedModel, batch: list[GenerateJob]) -> list[GeneratedText]:
    found = [result.generated for result in run(Engine(loaded, "off"), batch)]
    assert all(isinstance(one, GeneratedText) for one in found)
    return [one for one in found if one is not None]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_padded_decodingwrites_what_transformers_writes_prompt_by_prompt(
    checkpoints: Checkpoints, recipe: str
) -> None:
    loaded = checkpoints.loaded(recipe)
    batch = jobs(loaded)
    assert len({len(job.token_ids) for job in batch}) > 3
    for job, ours in zip(batch, written(loaded, batch), strict=True):
        ids = torch.tensor([job.token_ids], device=loaded.device)
        expected = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert list(ours.token_ids) == expected
        assert ours.text == loaded.tokenizer.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert len(ours.tokens) == len(ours.logprobs) == len(expected)


def test_log_probabilities_are_those_of_a_forward_pass_over_the_whole(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("grouped")
    batch = jobs(loaded, temperature=1.5, seed=3)
    for job, ours in zip(batch, written(loaded, batch), strict=True):
        ids = torch.tensor([[*job.token_ids, *ours.token_ids]], device=loaded.device)
        with torch.no_grad():
            logprobs = loaded.model(ids).logits[0].float().log_softmax(-1)
        for place, (token, logprob) in enumerate(zip(ours.token_ids, ours.logprobs, strict=True)):
            before = len(job.token_ids) + place - 1
            assert logprob == pytest.approx(float(logprobs[before, token]), abs=2e-4)


def test_texts_that_outgrow_the_short_frequencies_of_longrope(checkpoints: Checkpoints) -> None:
    """
    Given a model whose rotary frequencies change for prompts of more than 40 tokens
    If texts reach and pass that length, beside one that does not
    I expect at each step what transformers computes of all tokens so far, without a cache.
    """
    loaded = checkpoints.loaded("phi3")
    prompts = [tuple(range(20, 20 + length)) for length in (12, 33, 39, 40, 41)]
    spec = Sampling(max_new_tokens=12)
    batch = prepare(loaded, *(GenerateRequest(prompt, spec) for prompt in prompts))
    model = AutoModelForCausalLM.from_pretrained(checkpoints.folder("phi3")).to(loaded.device)
    for prompt, ours in zip(prompts, written(loaded, batch), strict=True):
        ids = [*prompt]
        for token, logprob in zip(ours.token_ids, ours.logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=loaded.device)).logits[0, -1]
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=2e-4)
            ids.append(token)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("steered", [False, True])
def test_the_rules_change_nothing_in_a_forward_pass(
    checkpoints: Checkpoints, recipe: str, rule: str, steered: bool
) -> None:
    """
    Given texts that a model wrote without any rule, steered or not
    If every token of them is predicted again by a trace under a rule, with the same steering
    I expect the same token to be likeliest, with the same probability but for rounding.
    """
    loaded = checkpoints.loaded(recipe)
    edits = (Edit("neuron", 1, (3, 5), scale=0.0, value=6.0),) if steered else ()
    batch = jobs(loaded, *edits)
    prompts = [list(job.token_ids) for job in batch]
    texts = list(zip(prompts, written(loaded, batch), strict=True))
    specs = [
        TraceRequest(
            (*ids, *text.token_ids[:place]),
            targets=(TargetRequest(logprob=True),),
            rule=rule,
            edits=edits,
        )
        for ids, text in texts
        for place in range(0, len(text.token_ids), 3)
    ]
    found = iter(run(Engine(loaded, "off"), prepare(loaded, *specs)))
    for _, text in texts:
        for place in range(0, len(text.token_ids), 3):
            (target,) = next(found).targets
            assert target.token_id == text.token_ids[place]
            assert target.logit == pytest.approx(text.logprobs[place], abs=2e-4)


def test_a_seed_gives_the_same_text_whatever_the_batch(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    batch = jobs(loaded, temperature=1.0, top_p=0.9, seed=11)
    together = written(loaded, batch)
    alone = [written(loaded, [job])[0] for job in batch]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    other = written(loaded, jobs(loaded, temperature=1.0, top_p=0.9, seed=12))
    assert [one.token_ids for one in together] != [one.token_ids for one in other]


def test_a_text_ends_with_the_token_that_ends_texts(checkpoints: Checkpoints) -> None:
    """
    Given a model one of whose tokens ends texts
    If it writes that token
    I expect the text to end with it, while the others of the batch go on.
    """
    loaded = checkpoints.loaded("grouped")
    batch = jobs(loaded)
    first = written(loaded, batch)
    third = first[1].token_ids[2]
    before = loaded.model.generation_config.eos_token_id
    # Beside the one that it has.
    loaded.model.generation_config.eos_token_id = [before, third]
    try:
        found = written(loaded, batch)
    finally:
        loaded.model.generation_config.eos_token_id = before
    for one, whole in zip(found, first, strict=True):
        ends = whole.token_ids.index(third) + 1 if third in whole.token_ids else None
        assert one.token_ids == whole.token_ids[:ends]
        assert one.stopped == (ends is not None or whole.stopped)
    assert found[1].stopped


@pytest.mark.parametrize(
    "edit",
    [
        Edit("neuron", 1, (3, 5), scale=0.0, value=6.0),
        Edit("resid", 2, positions=(-1,), scale=-1.0),
        Edit("embed", positions=(0,), scale=0.0),
        Edit("head", 0, (1,), scale=3.0),
    ],
)
def test_edits_hold_for_every_token_that_is_written(checkpoints: Checkpoints, edit: Edit) -> None:
    """Each token is what a pass over all tokens before it predicts, with the edit made there."""
    loaded = checkpoints.loaded("grouped")
    batch = jobs(loaded, edit)
    plain = written(loaded, jobs(loaded))
    steered = written(loaded, batch)
    assert [one.token_ids for one in steered] != [one.token_ids for one in plain]
    engine = Engine(loaded, "off")
    for job, ours in zip(batch[:3], steered[:3], strict=True):
        for count in (0, 1, 5):
            ids = job.token_ids + ours.token_ids[:count]
            # Counted from the end of the prompt, as the job does.
            positions = tuple(p % len(job.token_ids) for p in edit.positions)
            there = Edit(edit.site, edit.layer, edit.features, positions, edit.scale, edit.value)
            spec = TraceRequest(ids, (), targets=(TargetRequest(),), edits=(there,))
            (result,) = run(engine, prepare(loaded, spec))
            assert result.targets[0].token_id == ours.token_ids[count]


def test_jobs_of_a_decodingdo_not_feel_each_others_edits(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    plain, edited = jobs(loaded), jobs(loaded, Edit("neuron", 1, (3,), scale=0.0, value=9.0))
    mixed = [a if n % 2 else b for n, (a, b) in enumerate(zip(plain, edited, strict=True))]
    for one, ours in zip(mixed, written(loaded, mixed), strict=True):
        assert written(loaded, [one])[0].token_ids == ours.token_ids


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sources = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    logits = chances.log().expand(3, -1)

    def drawn() -> list[int]:
        # Each text in its own way: all tokens, those that have 0.6 together, the likeliest.
        specs = [Sampling(1, 1.0), Sampling(1, 1.0, 0.6), Sampling(1)]
        return sample(logits, specs, [*sources, sources[0]]).tolist()

    anyone, likely, likeliest = zip(*(drawn() for _ in range(4000)), strict=True)
    for token, chance in enumerate(chances.tolist()):
        assert anyone.count(token) / 4000 == pytest.approx(chance, abs=0.03)
    assert set(likely) == {0, 1}
    assert likely.count(0) / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    assert set(likeliest) == {0}


def test_traces_and_texts_share_a_batch(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    (trace,) = prepare(loaded, TraceRequest(PROMPTS[0]))
    first, second = run(Engine(loaded, "auto"), [jobs(loaded)[0], trace])
    assert first.generated is not None
    assert first.tensors == first.targets == ()
    assert second.generated is None
    assert second.tensors


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"max_new_tokens": 0}, r"generation\.max_new_tokens: is 0; allowed: 1 to 1024"),
        ({"max_new_tokens": 1000}, r"generation\.max_new_tokens: is 1000 after a prompt of"),
        ({"temperature": -1.0}, r"generation\.temperature: is -1.0; allowed: 0 to 100"),
        ({"temperature": float("nan")}, r"generation\.temperature: is nan"),
        ({"top_p": 1.5}, r"generation\.top_p: is 1.5; allowed: 0 to 1"),
    ],
)
def test_what_can_not_be_is_named(
    checkpoints: Checkpoints, how: dict[str, float], said: str
) -> None:
    with pytest.raises(InvalidJob, match=said):
        jobs(checkpoints.loaded("grouped"), **how)


def test_a_text_is_the_same_in_whatever_steps_it_is_written(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    engine, batch = Engine(loaded, "off"), jobs(loaded, Edit("neuron", 1, (3,), scale=2.0))
    whole = written(loaded, batch)
    (trace,) = prepare(loaded, TraceRequest(PROMPTS[1]))
    texts = engine.begin(batch)
    found = {}
    for tokens in (1, 2, 3, 50):
        engine.advance(texts, steps=tokens)
        found |= texts.take_outcomes()
        # Traces run in between, and find the model as it was.
        run(engine, [trace])
    assert texts.finished
    assert [found[n].generated.token_ids for n in sorted(found)] == [one.token_ids for one in whole]


@pytest.mark.parametrize("recipe", ["grouped", "mistral", "gemma3"])
def test_who_has_ended_takes_no_more_room(
    checkpoints: Checkpoints, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given texts of very different lengths, edited and drawn with seeds
    If some of them have ended
    I expect the model to run over the others alone, and these to be what they are alone.
    """
    loaded = checkpoints.loaded(recipe)
    edit = Edit("neuron", 1, (3,), scale=2.0)
    lengths = [30, 2, 3, 12, 2]
    batch = [
        jobs(loaded, edit, max_new_tokens=length, temperature=1.0, seed=n)[n]
        for n, length in enumerate(lengths)
    ]
    alone = [written(loaded, [job])[0] for job in batch]
    rows: list[int] = []
    forward = DecodeBatch._logits

    def counted(decoding: DecodeBatch, ids: torch.Tensor, past: int) -> torch.Tensor:
        if not decoding.reads:
            rows.append(len(ids))
        return forward(decoding, ids, past)

    monkeypatch.setattr(DecodeBatch, "_logits", counted)
    assert [one.token_ids for one in written(loaded, batch)] == [one.token_ids for one in alone]
    counts = [len(one.token_ids) for one in alone]
    # The first token of each comes with its prompt.
    assert rows == [sum(count > step for count in counts) for step in range(1, max(counts))]


def test_a_model_that_overflows_on_one_text_writes_the_others(checkpoints: Checkpoints) -> None:
    """
    Given edits of one job that overflow, and neighbours that write greedily and draw
    I expect its own error for that job alone, and the others' texts as they are without it.
    """
    loaded = checkpoints.loaded("grouped")
    far = (Edit("resid", 2, scale=1e9),) * 5
    broken = jobs(loaded, *far)[0]
    drawn = jobs(loaded, temperature=1.0, seed=4)[1]
    others = [jobs(loaded)[2], drawn]
    found = outcomes(
        Engine(loaded, "off"), [broken, *others, jobs(loaded, *far, temperature=1.0)[1]]
    )
    for error in (found[0], found[3]):
        assert type(error) is EngineError
        assert "the logits of token 0 of the text are not finite" in str(error)
    for outcome, alone in zip(found[1:3], written(loaded, others), strict=True):
        assert isinstance(outcome, JobResult)
        assert outcome.generated is not None
        assert outcome.generated.token_ids == alone.token_ids
