"""Every site and reduction against plain autograd on the untouched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.gradient import gradient_times_input
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.engine.sites import HookPoint, Site
from reltrace_worker.session.headers import model_info
from reltrace_worker.types.jobs import TraceRequest

REDUCED = {
    "token": lambda full: full.sum(-1),
    "feature": lambda full: full.sum(-2),
    "full": lambda full: full,
}


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("reduction", REDUCED)
def test_the_gradient_rule_is_plain_autograd(
    checkpoints: Checkpoints, reduction: str, checkpointing: Any
) -> None:
    """
    Given a pack of prompts that ask for all sites
    If it is traced with the rule "gradient"
    I expect gradient times input of the untouched model, prompt by prompt.
    """
    loaded = checkpoints.loaded("grouped")
    specs = [TraceRequest(p, tuple(SITES), reduction, rule="gradient") for p in PROMPTS[:4]]
    jobs = prepare(loaded, *specs)
    for job, result in zip(jobs, run(Engine(loaded, checkpointing), jobs), strict=True):
        expected = gradient_times_input(loaded.model, job.token_ids).values
        assert [tensor.site for tensor in result.tensors] == list(SITES)
        for tensor in result.tensors:
            values, wanted = tensor.values, REDUCED[reduction](expected[tensor.site])
            assert values.shape == wanted.shape
            assert values.dtype == torch.float32
            assert values.is_contiguous()
            assert float(wanted.abs().max()) > 1e-3
            assert float((values - wanted).abs().max() / wanted.abs().max()) < 1e-5, tensor.site


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
def test_the_reductions_are_sums_of_the_full_trace(checkpoints: Checkpoints, rule: str) -> None:
    loaded = checkpoints.loaded("grouped")
    prompt, sites = PROMPTS[0], tuple(SITES)
    specs = [TraceRequest(prompt, sites, reduction, rule=rule) for reduction in REDUCED]
    results = dict(zip(REDUCED, run(Engine(loaded), prepare(loaded, *specs)), strict=True))
    for index, full in enumerate(results["full"].tensors):
        for reduction in REDUCED:
            values = results[reduction].tensors[index].values
            wanted = REDUCED[reduction](full.values)
            assert values.shape == wanted.shape
            assert torch.allclose(values, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_residual_stream_is_the_sum_of_its_parts(checkpoints: Checkpoints) -> None:
    """
    Given the residual stream after a layer, which is what stood before plus what the MLP adds
    If LRP starts at the logit with 1
    I expect the last layer to sum to the logit, and resid_mid + mlp_out there likewise: the
    gradient at both is the gradient at their sum, but for the path through the MLP.
    """
    loaded = checkpoints.loaded("grouped")
    sites = ("resid", "resid_mid", "mlp_out")
    (job,) = prepare(loaded, TraceRequest(PROMPTS[0], sites, rule="cp_lrp"))
    (result,) = run(Engine(loaded), [job])
    resid, resid_mid, mlp_out = (tensor.values for tensor in result.tensors)
    assert float(resid[-1].sum()) == pytest.approx(result.targets[0].logit, rel=1e-4)
    # Only the last position feeds the logit, and relevance reaches the earlier ones below it.
    assert float(resid[-1, :-1].abs().max()) == 0.0
    assert float(resid_mid.sum(-1)[-1]) == pytest.approx(result.targets[0].logit, rel=1e-4)
    assert float(mlp_out.abs().max()) > 0.0


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_further_site_is_one_entry(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, checkpointing: Any
) -> None:
    """
    Given one more entry in the table of sites: the queries
    If a job asks for it
    I expect it to be announced, traced, and right.
    """
    queries = Site(
        "query", lambda shape: shape.hidden_size, lambda _: HookPoint("self_attn.q_proj")
    )
    monkeypatch.setitem(SITES, "query", queries)
    loaded = checkpoints.loaded("plain")
    model: Any = loaded.model
    assert "query" in model_info(loaded).sites

    jobs = prepare(loaded, TraceRequest(PROMPTS[0], ("query",), "full", rule="gradient"))
    (result,) = run(Engine(loaded, checkpointing), jobs)

    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handles = [layer.self_attn.q_proj.register_forward_hook(keep) for layer in model.model.layers]
    ids = torch.tensor([jobs[0].token_ids], device=loaded.device)
    embeddings = model.model.embed_tokens(ids).requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].max().backward()
    for handle in handles:
        handle.remove()
    wanted = torch.stack([(t * t.grad).detach()[0].cpu() for t in kept])
    values = result.tensors[0].values
    assert values.shape == wanted.shape
    assert float((values - wanted).abs().max() / wanted.abs().max()) < 1e-5
