"""The engine against LRP in float64 by autograd over detached modules, for every family."""

from __future__ import annotations

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.detached import detach
from reference.gradient import gradient_times_input
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES
from reltrace_worker.types.jobs import TraceRequest
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["grouped", *FAMILY_RECIPES])
def test_every_site_is_that_of_the_reference(
    checkpoints: Checkpoints, name: str, rule: str
) -> None:
    """
    Given the model as transformers loads it, in float64, and what a rule holds constant detached
    If prompts are traced in one pack, and each alone
    I expect gradient times input of that model, to 2e-5 of a layer's largest |R|.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoints.folder(name), dtype=torch.float64)
    model.requires_grad_(False).eval()
    detach(model, rule)
    loaded = checkpoints.loaded(name)
    jobs = prepare(loaded, *(TraceRequest(p, tuple(SITES), "full", rule=rule) for p in PROMPTS))
    engine = Engine(loaded)
    for job, packed in zip(jobs, run(engine, jobs), strict=True):
        wanted = gradient_times_input(model, job.token_ids)
        (alone,) = run(engine, [job])
        for result in (packed, alone):
            (target,) = result.targets
            assert target.token_id == wanted.token_id
            assert target.logit == pytest.approx(wanted.logit, rel=1e-5)
            for tensor in result.tensors:
                expected = wanted.values[tensor.site]
                assert tensor.values.shape == expected.shape
                largest = expected.abs().amax((-1, -2), keepdim=True)
                error = (tensor.values.cpu() - expected).abs() / largest
                assert float(error.max()) < 2e-5, (tensor.site, len(job.token_ids))
