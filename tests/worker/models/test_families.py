"""The same sites, rules and targets for every family, through sliding windows too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES, RECIPES
from reference.gradient import gradient_times_input
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.engine.sites import HookPoint
from reltrace_worker.lrp import RULES, verify_rule
from reltrace_worker.models import FAMILIES, LoadedModel
from reltrace_worker.models.families import family_of
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult, SiteTensor

TARGETS = (
    TargetRequest(),
    TargetRequest(token=5, contrast=9),
    TargetRequest(position=0, logprob=True),
)

families = pytest.mark.parametrize("name", FAMILY_RECIPES)
rules = pytest.mark.parametrize("rule", RULES)


def layers_of(tensor: SiteTensor) -> torch.Tensor:
    """[layers, everything else]; `embed` counts as one layer."""
    values = tensor.values if SITES[tensor.site].per_layer else tensor.values[None]
    return values.flatten(1)


def assert_close(ours: SiteTensor, wanted: SiteTensor, relative: float) -> None:
    """Within a part of each layer's largest |R|."""
    left, right = layers_of(ours), layers_of(wanted)
    assert left.shape == right.shape
    error = (left - right).abs().amax(1) / right.abs().amax(1)
    assert float(error.max()) <= relative, (ours.site, error)


def test_every_family_is_covered() -> None:
    covered = {RECIPES[name].family for name in FAMILY_RECIPES}
    assert covered | {"llama"} == set(FAMILIES)


def test_a_prompt_of_the_tests_is_longer_than_every_window() -> None:
    longest = max(len(prompt) for prompt in PROMPTS if not isinstance(prompt, str))
    for name in FAMILY_RECIPES:
        window = RECIPES[name].sliding_window
        if window is None:
            continue
        assert longest > 2 * window
        assert longest % window


@families
def test_outputs_are_what_is_added_to_the_residual_stream(
    checkpoints: Checkpoints, name: str
) -> None:
    """
    Given a layer's input x and the tensors at the sites of the layer
    If they are added up
    I expect x + attn_out to be resid_mid, and resid_mid + mlp_out to be resid.
    """
    loaded = checkpoints.loaded(name)
    seen: dict[str, torch.Tensor] = {}
    (layer, *_) = loaded.family.decoder_layers(loaded.model)

    def keep(site: str) -> Any:
        def hook(tensor: torch.Tensor) -> None:
            seen[site] = tensor

        return hook

    handles = [HookPoint("", is_input=True).register(layer, keep("input"))]
    for site in ("resid", "resid_mid", "attn_out", "mlp_out"):
        hook_point = SITES[site].hook_point
        assert hook_point is not None
        handles.append(hook_point(loaded.family).register(layer, keep(site)))
    loaded.model(input_ids=torch.tensor([[3, 14, 15, 92]], device=loaded.device))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["input"] + seen["attn_out"], seen["resid_mid"])
    assert torch.equal(seen["resid_mid"] + seen["mlp_out"], seen["resid"])


@rules
@families
def test_packed_equals_alone(checkpoints: Checkpoints, name: str, rule: str) -> None:
    loaded = checkpoints.loaded(name)
    engine = Engine(loaded, "off")
    jobs = prepare(loaded, *(TraceRequest(p, tuple(SITES), "full", rule=rule) for p in PROMPTS))
    for job, packed in zip(jobs, run(engine, jobs), strict=True):
        (alone,) = run(engine, [job])
        assert [t.token_id for t in packed.targets] == [t.token_id for t in alone.targets]
        for ours, wanted in zip(packed.tensors, alone.tensors, strict=True):
            assert_close(ours, wanted, 1e-5)


@rules
@families
def test_checkpointing_changes_no_bit(checkpoints: Checkpoints, name: str, rule: str) -> None:
    loaded = checkpoints.loaded(name)
    specs = [TraceRequest(PROMPTS[i], tuple(SITES), "full", TARGETS, rule) for i in (0, 1, 4, 5)]
    jobs = prepare(loaded, *specs)
    kept, recomputed = (run(Engine(loaded, mode), jobs) for mode in ("off", "on"))
    for off, on in zip(kept, recomputed, strict=True):
        assert off.targets == on.targets
        for left, right in zip(off.tensors, on.tensors, strict=True):
            assert torch.equal(left.values, right.values), left.site


@families
def test_the_gradient_rule_is_plain_autograd_and_leaves_the_model_untouched(
    checkpoints: Checkpoints, name: str
) -> None:
    """
    Given gradient times input of the model as transformers runs it
    If every rule has run, and prompts are traced with the rule "gradient"
    I expect those numbers, and the model to give the same bits as before.
    """
    loaded = checkpoints.loaded(name)
    before = [
        gradient_times_input(loaded.model, job.token_ids).values for job in _gradient_jobs(loaded)
    ]
    attributes = {path: sorted(vars(module)) for path, module in loaded.model.named_modules()}
    kernel = loaded.model.config._attn_implementation
    for rule in RULES:
        run(Engine(loaded), prepare(loaded, TraceRequest(PROMPTS[0], tuple(SITES), rule=rule)))
    for job, result, wanted in zip(
        _gradient_jobs(loaded), _run_gradient(loaded), before, strict=True
    ):
        for tensor in result.tensors:
            assert_close(tensor, SiteTensor(0, tensor.site, "", wanted[tensor.site]), 1e-4)
        again = gradient_times_input(loaded.model, job.token_ids).values
        assert all(torch.equal(again[site], wanted[site]) for site in SITES)
    assert {p: sorted(vars(m)) for p, m in loaded.model.named_modules()} == attributes
    assert loaded.model.config._attn_implementation == kernel


def _gradient_jobs(loaded: LoadedModel) -> list[Any]:
    specs = (TraceRequest(PROMPTS[i], tuple(SITES), "full", rule="gradient") for i in (0, 5))
    return prepare(loaded, *specs)


def _run_gradient(loaded: LoadedModel) -> list[JobResult]:
    return run(Engine(loaded), _gradient_jobs(loaded))


def conservation(loaded: LoadedModel) -> tuple[list[float], list[float]]:
    """Return the logit of each prompt's largest token, and per prompt the worst sum over it."""
    specs = [TraceRequest(p, ("embed", "resid", "resid_mid"), rule="cp_lrp") for p in PROMPTS]
    logits, worst = [], []
    for result in run(Engine(loaded), prepare(loaded, *specs)):
        logit = result.targets[0].logit
        sums = torch.cat([layers_of(tensor).sum(-1) for tensor in result.tensors]) / logit
        logits.append(logit)
        worst.append(float(sums[(sums - 1).abs().argmax()]))
    return logits, worst


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2_unbiased", "qwen3", "gemma3", "olmo2", "phi3", "smollm3"]
)
def test_cp_lrp_conserves_relevance(checkpoints: Checkpoints, name: str) -> None:
    _, worst = conservation(checkpoints.loaded(name))
    assert worst == pytest.approx([1.0] * len(PROMPTS), rel=1e-3)


def test_biases_of_values_absorb_relevance(checkpoints: Checkpoints) -> None:
    """
    Given Qwen2, whose value projections have biases: inputs that no token carries
    If it is traced under CP-LRP
    I expect the last residual stream to sum to the logit, and what lies below to miss a part.
    """
    loaded = checkpoints.loaded("qwen2")
    (result,) = run(
        Engine(loaded), prepare(loaded, TraceRequest(PROMPTS[0], ("resid",), rule="cp_lrp"))
    )
    sums = result.tensors[0].values.sum(-1) / result.targets[0].logit
    assert float(sums[-1]) == pytest.approx(1.0, rel=1e-4)
    _, worst = conservation(loaded)
    assert max(abs(ratio - 1) for ratio in worst) > 0.01


def test_a_capped_logit_passes_on_the_slope_of_its_cap(checkpoints: Checkpoints) -> None:
    """
    Given logits y = c tanh(z / c), whose cap lxt's rules leave as it is
    If they are traced under CP-LRP
    I expect every sum to be z * dy/dz = z (1 - (y / c)^2) instead of y.
    """
    cap = RECIPES["gemma3_softcap"].logit_softcap
    assert cap is not None
    logits, worst = conservation(checkpoints.loaded("gemma3_softcap"))
    for y, ratio in zip(logits, worst, strict=True):
        assert 0.2 * cap < y < cap
        z = cap * math.atanh(y / cap)
        assert ratio * y == pytest.approx(z * (1 - (y / cap) ** 2), rel=1e-3)


@rules
@families
def test_the_probe_reaches_every_module(checkpoints: Checkpoints, name: str, rule: str) -> None:
    model = checkpoints.loaded(name).model
    family = family_of(model)
    verify_rule(model, RULES[rule])
    norms = sum(isinstance(module, family.norm) for module in model.modules())
    assert norms == family.norms_per_layer * len(family.decoder_layers(model)) + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@families
def test_a_rule_changes_no_value(checkpoints: Checkpoints, name: str, dtype: str) -> None:
    """The norms of a rule round where the family's own norms round."""
    loaded = checkpoints.loaded(name, dtype)
    spec = TraceRequest(PROMPTS[0], ("embed",))
    (result,) = run(Engine(loaded), prepare(loaded, spec))
    (job,) = prepare(loaded, spec)
    logits = (
        loaded.model(input_ids=torch.tensor([job.token_ids], device=loaded.device))
        .logits[0, -1]
        .float()
    )
    exact = 1e-5 if dtype == "float32" else 2e-2
    assert result.targets[0].logit == pytest.approx(float(logits.max()), rel=exact)
