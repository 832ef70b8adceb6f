"""What a number means: conservation, number formats, and a model that stays what it was."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.jobs import TraceRequest


@pytest.mark.parametrize("name", ["grouped", "tied", "llama3_rope"])
def test_cp_lrp_conserves_relevance(checkpoints: Checkpoints, name: str) -> None:
    """
    Given the rule CP-LRP, under which every function is linear in what carries relevance
    If the backward pass starts at 1
    I expect the embeddings and every residual stream to sum to the logit.
    """
    loaded = checkpoints.loaded(name)
    specs = [TraceRequest(p, ("embed", "resid", "resid_mid"), rule="cp_lrp") for p in PROMPTS]
    for result in run(Engine(loaded), prepare(loaded, *specs)):
        logit = result.targets[0].logit
        for tensor in result.tensors:
            sums = tensor.values.sum(-1).reshape(-1)
            assert sums.tolist() == pytest.approx([logit] * len(sums), rel=1e-3), tensor.site


@pytest.mark.parametrize("rule", RULES)
def test_the_last_residual_stream_sums_to_the_logit_under_lrp(
    checkpoints: Checkpoints, rule: str
) -> None:
    loaded = checkpoints.loaded("grouped")
    (result,) = run(Engine(loaded), prepare(loaded, TraceRequest(PROMPTS[0], rule=rule)))
    total, logit = float(result.tensors[0].values[-1].sum()), result.targets[0].logit
    if rule == "gradient":
        # The derivative of a norm along its input is zero: nothing is conserved.
        assert abs(total) < 1e-3 * abs(logit)
    else:
        assert total == pytest.approx(logit, rel=1e-5)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_bfloat16_is_the_same_trace_with_noise(
    checkpoints: Checkpoints, checkpointing: Any
) -> None:
    exact, rough = (checkpoints.loaded("plain", dtype) for dtype in ("float32", "bfloat16"))
    spec = TraceRequest(PROMPTS[0], tuple(SITES))
    (wanted,) = run(Engine(exact), prepare(exact, spec))
    (result,) = run(Engine(rough, checkpointing), prepare(rough, spec))
    assert result.targets[0].token_id == wanted.targets[0].token_id
    assert result.targets[0].logit == pytest.approx(wanted.targets[0].logit, rel=0.05)
    for tensor, reference in zip(result.tensors, wanted.tensors, strict=True):
        assert tensor.values.dtype == torch.float32
        pair = torch.stack([tensor.values.flatten(), reference.values.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.95, tensor.site


def plain_gradient(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor([[3, 14, 15, 92, 65]], device=loaded.device)
    embeddings = loaded.model.get_input_embeddings()(ids)
    embeddings.requires_grad_()
    loaded.model(inputs_embeds=embeddings).logits[0, -1, 7].backward()
    assert embeddings.grad is not None
    return embeddings.grad


def state(loaded: LoadedModel) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    return {
        name: (
            sorted(vars(module)),
            vars(module).get("forward"),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            module.training,
            [(p.requires_grad, p.grad) for p in module.parameters()],
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in loaded.model.named_modules()
    }


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_leaves_the_model_untouched(
    checkpoints: Checkpoints, rule: str, checkpointing: Any
) -> None:
    loaded = checkpoints.loaded("grouped")
    before, gradient = state(loaded), plain_gradient(loaded)
    weights = {name: p.clone() for name, p in loaded.model.named_parameters()}
    run(
        Engine(loaded, checkpointing),
        prepare(loaded, *(TraceRequest(p, tuple(SITES), rule=rule) for p in PROMPTS[:3])),
    )
    assert state(loaded) == before
    assert torch.equal(plain_gradient(loaded), gradient)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_run_leaves_no_graph_behind(checkpoints: Checkpoints, checkpointing: Any) -> None:
    """
    Given hooks on tensors, which can keep their graph alive through a cycle
    If a run is over
    I expect every tensor that its graph saved to be gone, without a garbage collection.
    """
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest(PROMPTS[0], tuple(SITES)))
    saved: list[weakref.ref[Any]] = []

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            # Detached: held itself, an output that is saved would keep its own graph.
            self.tensor = tensor.detach()
            saved.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            results = run(Engine(loaded, checkpointing), jobs)
        alive = [reference for reference in saved if reference() is not None]
    finally:
        gc.enable()
    assert results
    assert len(saved) > 20
    assert alive == []


def test_dropout_of_a_config_is_off(checkpoints: Checkpoints) -> None:
    """A trace is deterministic, also of a model that was trained with attention dropout."""
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest(PROMPTS[0], ("resid", "head")))
    (wanted,) = run(Engine(loaded), jobs)
    attentions = [m for m in loaded.model.modules() if isinstance(m, loaded.family.attention)]
    try:
        for attention in attentions:
            attention.attention_dropout = 0.5
        (result,) = run(Engine(loaded), jobs)
    finally:
        for attention in attentions:
            attention.attention_dropout = 0.0
    for left, right in zip(result.tensors, wanted.tensors, strict=True):
        assert torch.equal(left.values, right.values)
