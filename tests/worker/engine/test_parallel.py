"""Tensor parallelism: every number of a model that real processes compute together, over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES, RECIPES, save_checkpoint
from reference.loaded import PROMPTS, prepare, run
from reference.ranks import Pair, divided
from reference.real_models import RealModels
from reltrace_worker.engine import REDUCTIONS, SITES, JobPreparer
from reltrace_worker.engine.memory import MemoryPlan
from reltrace_worker.engine.recorder import RelevanceRecorder
from reltrace_worker.engine.site_atlas import POINT, values_of
from reltrace_worker.lrp import RULES
from reltrace_worker.models.families import FAMILIES
from reltrace_worker.models.sharding import _INTO, _OUT_OF, check_sizes
from reltrace_worker.types.errors import EngineError, ModelError, PassFailedError
from reltrace_worker.types.jobs import (
    AtlasRequest,
    Edit,
    GenerateRequest,
    Sampling,
    TargetRequest,
    TraceJob,
    TraceRequest,
)
from reltrace_worker.types.results import JobResult

TOLERANCE = 2e-5
"""Of the largest value of a tensor: sums over ranks are rounded in another order."""

ROUNDING = 2e-6
"""Of the target's scalar."""

FAST = ("grouped", "gemma3", "olmo2")
"""A llama whose heads share keys; norms per head; and attention that is not divided."""

EDITS = (
    Edit("neuron", 1, features=(3, 70), positions=(1, 2), scale=0.0, value=0.7),
    Edit("head", 0, features=(0, 3), scale=0.5),
    Edit("resid_mid", 1, features=(5,), value=0.3),
    Edit("neuron", 2, direction=tuple(0.01 * i for i in range(80))),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """Models in two processes, by their recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = [save_checkpoint(folder / name, RECIPES[name]) for name in FAST]
    with divided(2, models, folder) as found:
        yield dict(zip(FAST, found, strict=True))
    torch.set_num_threads(threads)


def everything(rule: str) -> list[TraceRequest]:
    """Jobs of a rule, for one pass: every site and reduction, targets, layers, edits."""
    targets = (TargetRequest(), TargetRequest(token=5, position=-2, logprob=True))
    reduced = [
        TraceRequest(PROMPTS[1], tuple(SITES), name, rule=rule, k=5 if name == "topk" else 0)
        for name in REDUCTIONS
    ]
    return [
        TraceRequest(PROMPTS[0], tuple(SITES), "full", targets, rule),
        TraceRequest(PROMPTS[5], ("head", "neuron", "attn_out"), "full", rule=rule, layers=(2, 1)),
        TraceRequest(PROMPTS[3], tuple(SITES), "full", rule=rule, edits=EDITS),
        *reduced,
    ]


def assert_close(ours: list[JobResult], wanted: list[JobResult]) -> None:
    for left, right in zip(ours, wanted, strict=True):
        assert [t.token_id for t in left.targets] == [t.token_id for t in right.targets]
        for one, other in zip(left.targets, right.targets, strict=True):
            assert one.logit == pytest.approx(other.logit, rel=TOLERANCE, abs=TOLERANCE)
        for a, b in zip(left.tensors, right.tensors, strict=True):
            assert (a.site, a.part, a.values.shape) == (b.site, b.part, b.values.shape)
            error = (a.values.double() - b.values.double()).abs().max()
            bound = TOLERANCE * float(b.values.abs().max())
            # A sum of what cancels is nothing but rounding.
            bound += ROUNDING * abs(right.targets[0].logit)
            assert float(error) <= bound, (a.site, a.part)


def compare(pair: Pair, checkpointing: Any) -> None:
    """Run jobs of every rule in several processes and in one."""
    leading, alone = pair.engines(checkpointing)
    for rule in RULES:
        jobs = prepare(pair.alone, *everything(rule))
        assert_close(run(leading, jobs), run(alone, jobs))
        # Several backward passes after one forward pass.
        (first, *_) = jobs
        apart = [replace(first, packs_targets=False)]
        assert_close(run(leading, apart), run(alone, apart))


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", FAST)
def test_every_site_rule_and_reduction(
    pairs: dict[str, Pair], name: str, checkpointing: Any
) -> None:
    compare(pairs[name], checkpointing)


def test_each_rank_has_its_part_alone(pairs: dict[str, Pair]) -> None:
    """Weights, and what is planned for a pass; OLMo 2's attention is whole in each."""
    for name, pair in pairs.items():
        parts, whole = (dict(m.model.named_parameters()) for m in (pair.divided, pair.alone))
        for path, part in parts.items():
            projection = path.split(".")[-2]
            is_divided = projection in (*_INTO["neurons"], _OUT_OF["neurons"])
            if name != "olmo2":
                is_divided |= projection in (*_INTO["heads"], _OUT_OF["heads"])
            assert whole[path].numel() == part.numel() * (2 if is_divided else 1), path
        here, there = (MemoryPlan(m, 1 << 30) for m in (pair.divided, pair.alone))
        for checkpointing in (True, False):
            ours = here.bytes_per_token("attnlrp", checkpointing)
            assert ours < there.bytes_per_token("attnlrp", checkpointing)
        assert pair.divided.parameters == pair.alone.parameters
        assert pair.divided.shape == pair.alone.shape
        assert (pair.divided.place, pair.alone.place) == ("2 x cpu", "cpu")


@pytest.mark.parametrize("name", FAST)
def test_texts(pairs: dict[str, Pair], name: str) -> None:
    """
    Given texts that are continued together, sampled and edited ones among them
    I expect the tokens of one process, and of one that is cancelled on the way no more.
    """
    sampled = Sampling(24, temperature=0.8, top_p=0.9, seed=3)
    requests = [
        GenerateRequest(PROMPTS[0], Sampling(6)),
        GenerateRequest(PROMPTS[5], sampled),
        GenerateRequest(PROMPTS[1], sampled, edits=EDITS),
    ]
    leading, alone = pairs[name].engines()
    jobs = prepare(pairs[name].alone, *requests)
    ours, wanted = run(leading, jobs), run(alone, jobs)
    for one, other in zip(ours, wanted, strict=True):
        assert one.generated
        assert other.generated
        assert one.generated.token_ids == other.generated.token_ids
        assert one.generated.logprobs == pytest.approx(other.generated.logprobs, abs=1e-4)
    # One joins in the middle of a call, another is cancelled.
    task = leading.begin(jobs[:2])
    joined: list[int | None] = []
    leading.advance(task, lambda: joined.append(task.join(jobs[2])), steps=1)
    leading.advance(task, steps=3)
    task.cancel(1)
    found: dict[int, Any] = {}
    while not task.finished:
        leading.advance(task, steps=4)
        found |= task.take_outcomes()
    assert joined == [2]
    assert found.keys() == {0, 2}
    for index, outcome in found.items():
        assert outcome.generated.token_ids == ours[index].generated.token_ids


def test_a_job_stops_between_its_targets(pairs: dict[str, Pair]) -> None:
    """Rank 0 decides: the result has the targets until then, and all ranks go on together."""
    leading, alone = pairs["grouped"].engines("off")
    targets = tuple(TargetRequest(token=token) for token in (3, 4, 5))
    (job,) = prepare(pairs["grouped"].alone, TraceRequest(PROMPTS[0], targets=targets))
    assert isinstance(job, TraceJob)
    apart = replace(job, packs_targets=False)
    leading.should_stop = lambda: True
    (ours,) = run(leading, [apart])
    assert len(ours.targets) == 1
    leading.should_stop = lambda: False
    assert_close(run(leading, [apart]), run(alone, [apart]))
    (first,) = run(alone, [apart.with_targets(apart.targets[:1])])
    assert_close([ours], [first])


def test_an_atlas(pairs: dict[str, Pair]) -> None:
    prompts = tuple(prompt for prompt in PROMPTS if isinstance(prompt, str))
    pair = pairs["grouped"]
    job = JobPreparer(pair.alone).prepare(AtlasRequest(prompts, k=2, positions=3))
    found = []
    for engine in pair.engines():
        atlas = engine.begin([job])
        while not atlas.finished:
            engine.advance(atlas)
        found.append(atlas.take_outcomes()[0].tensors)
    for one, other in zip(*found, strict=True):
        ours, wanted = one.values, other.values
        if one.part == "strongest":
            ours, wanted = values_of(ours), values_of(wanted)
        elif one.part == "high":
            ours, wanted = (v.double() * 2.0 ** (32 - POINT) for v in (ours, wanted))
        elif one.part in ("low", "histogram", "beside"):
            # Rounding moves values to the next bin, or the next place, now and then.
            continue
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2.0**-7)


def test_ranks_stay_in_step_when_a_pass_fails(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails at rank 0 alone, and what fails in all ranks, costs no more than the pass."""
    pair = pairs["grouped"]
    leading, alone = pair.engines()
    jobs = prepare(pair.alone, TraceRequest(PROMPTS[0], ("neuron", "resid")))

    def fails(*_: object) -> None:
        raise EngineError("not finite")

    with monkeypatch.context() as broken:
        broken.setattr(RelevanceRecorder, "record", fails)
        with pytest.raises(EngineError, match="not finite"):
            leading.run(jobs)
    (job,) = jobs
    assert isinstance(job, TraceJob)
    beyond = replace(job, prompt=replace(job.prompt, token_ids=(10**6,)), targets=job.targets[:1])
    with pytest.raises(PassFailedError):
        leading.run([beyond])
    assert_close(run(leading, jobs), run(alone, jobs))


def test_the_first_rank_chooses_tokens(pairs: dict[str, Pair]) -> None:
    """
    Given a rank 0 whose output head makes other tokens the likeliest than that of the others
    If targets are left to the model, and texts continue with them
    I expect both to be those of a model with that head.
    """
    pair = pairs["grouped"]
    leading, alone = pair.engines()
    traces = prepare(pair.alone, *(TraceRequest(p, tuple(SITES), "full") for p in PROMPTS[:2]))
    texts = prepare(pair.alone, GenerateRequest(PROMPTS[0], Sampling(8)))
    before = run(alone, texts)
    heads = [loaded.model.get_output_embeddings() for loaded in (pair.divided, pair.alone)]
    bias = torch.nn.Parameter(torch.linspace(-9.0, 9.0, 320), requires_grad=False)
    for head in heads:
        head.bias = bias
    try:
        ours, wanted = run(leading, texts), run(alone, texts)
        assert ours[0].generated is not None
        assert wanted[0].generated is not None
        assert ours[0].generated.token_ids == wanted[0].generated.token_ids
        assert wanted[0].generated != before[0].generated
        assert_close(run(leading, traces), run(alone, traces))
    finally:
        for head in heads:
            head.bias = None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_divided_is_what_transformers_divides(family: Any) -> None:
    """
    Given transformers' plan for a family
    I expect the same; but for Phi-3, whose fused projections its plan gathers instead.
    """
    plan = family.causal_lm.config_class.base_model_tp_plan
    styles = {path.rpartition(".")[2]: style for path, style in plan.items()}
    axes = [axis for axis in _INTO if axis == "neurons" or family.heads_are_independent]
    into = {name for axis in axes for name in _INTO[axis]} & styles.keys()
    out_of = {_OUT_OF[axis] for axis in axes}
    if family.model_type == "phi3":
        assert into == {name for name, style in styles.items() if style.startswith("colwise")}
        assert out_of == {name for name, style in styles.items() if style.startswith("rowwise")}
        return
    assert into == {name for name, style in styles.items() if style == "colwise"}
    assert out_of == {name for name, style in styles.items() if style == "rowwise"}


def test_a_size_that_does_not_divide_names_those_that_do(pairs: dict[str, Pair]) -> None:
    config = pairs["grouped"].alone.model.config
    message = (
        "--tensor-parallel 4 does not divide the model, whose layers have 80 neurons, 4 heads, "
        "2 key-value heads; allowed: 2"
    )
    with pytest.raises(ModelError, match=message):
        check_sizes(config, FAMILIES["llama"], 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_processes_and_every_family(tmp_path: Path) -> None:
    names = ("plain", *FAMILY_RECIPES)
    recipes = (replace(RECIPES[name], key_value_heads=4) for name in names)
    models = [save_checkpoint(tmp_path / n, r) for n, r in zip(names, recipes, strict=True)]
    with divided(4, models, tmp_path) as pairs:
        for pair in pairs:
            for checkpointing in ("on", "off"):
                compare(pair, checkpointing)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_weights_in_three_processes(real_models: RealModels, tmp_path: Path) -> None:
    """SmolLM2 has nine heads and three key-value heads."""
    with divided(3, [real_models.gguf("smollm2")], tmp_path) as (pair,):
        for checkpointing in ("on", "off"):
            leading, alone = pair.engines(checkpointing)
            for rule in RULES:
                requests = [
                    TraceRequest(
                        "The capital of France is the city of", tuple(SITES), "full", rule=rule
                    ),
                    TraceRequest(
                        "My cats love to play with my", tuple(SITES), "topk", rule=rule, k=9
                    ),
                ]
                jobs = prepare(pair.alone, *requests)
                assert_close(run(leading, jobs), run(alone, jobs))
        texts = prepare(pair.alone, GenerateRequest("The capital of France is", Sampling(12)))
        (ours,), (wanted,) = run(leading, texts), run(alone, texts)
        assert ours.generated
        assert wanted.generated
        assert ours.generated.token_ids == wanted.generated.token_ids
