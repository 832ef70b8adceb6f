"""A result does not depend on what its job was packed with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult


def assert_same(packed: JobResult, alone: JobResult) -> None:
    """Within 1e-5 of each layer's largest |R|.

    Sums can cancel where single values do not (attention and MLP outputs; every sum under
    "gradient", whose last residual stream sums to zero), so those are compared unreduced.
    """
    for left, right in zip(packed.targets, alone.targets, strict=True):
        assert left.token_id == right.token_id
        assert left.logit == pytest.approx(right.logit, rel=1e-5, abs=1e-5)
    for ours, wanted in zip(packed.tensors, alone.tensors, strict=True):
        assert (ours.trace, ours.site) == (wanted.trace, wanted.site)
        layers = wanted.values if SITES[wanted.site].per_layer else wanted.values[None]
        error = (ours.values.reshape(layers.shape) - layers).flatten(1).abs().amax(1)
        assert bool((error <= 1e-5 * layers.flatten(1).abs().amax(1)).all()), ours.site


@pytest.mark.parametrize("rule", RULES)
def test_packed_equals_alone(checkpoints: Checkpoints, rule: str) -> None:
    loaded = checkpoints.loaded("llama3_rope")
    engine = Engine(loaded, "off")
    specs = [
        TraceRequest(prompt, tuple(SITES)[i % 3 :], "full", rule=rule)
        for i, prompt in enumerate(PROMPTS)
    ]
    if rule != "gradient":
        specs += [TraceRequest(prompt, ("resid", "embed"), rule=rule) for prompt in PROMPTS]
    jobs = prepare(loaded, *specs)
    for job, packed in zip(jobs, run(engine, jobs), strict=True):
        assert_same(packed, run(engine, [job])[0])


ids = st.lists(st.integers(0, 319), min_size=1, max_size=40).map(tuple)


@settings(
    max_examples=12,
    deadline=None,
    # No shrinking: every example runs several passes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    prompts=st.lists(st.tuples(ids, st.sampled_from(sorted(RULES))), min_size=1, max_size=6),
    checkpointing=st.sampled_from(["on", "off"]),
)
def test_any_pack_equals_its_jobs_alone(
    checkpoints: Checkpoints, prompts: list[tuple[tuple[int, ...], str]], checkpointing: str
) -> None:
    """Property: rules, lengths and order of the batch do not matter to a job."""
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "on" if checkpointing == "on" else "off")
    specs = [
        TraceRequest(prompt, ("embed", "resid", "head"), "full", rule=rule)
        for prompt, rule in prompts
    ]
    jobs = prepare(loaded, *specs)
    for job, packed in zip(jobs, run(engine, jobs), strict=True):
        assert_same(packed, run(engine, [job])[0])


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_numbers_that_are_not_finite_fail_their_own_job_alone(
    checkpoints: Checkpoints, checkpointing: str
) -> None:
    """
    Given a model in which the embedding of one token is broken
    If a pack holds one prompt with that token between two without
    I expect an error for that one and for the others the numbers that they have alone.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "on" if checkpointing == "on" else "off")
    specs = [TraceRequest(p, ("resid", "neuron")) for p in ((5, 6, 7), (5, 200, 7), (8, 9, 10, 11))]
    jobs = prepare(loaded, *specs)
    table: torch.Tensor = loaded.model.get_input_embeddings().weight
    whole = table[200].clone()
    try:
        table[200, 3] = float("nan")
        good, broken, other = engine.run(jobs)
    finally:
        table[200] = whole
    assert isinstance(broken, EngineError)
    assert "not finite" in str(broken)
    for result, job in ((good, jobs[0]), (other, jobs[2])):
        assert isinstance(result, JobResult)
        assert_same(result, run(engine, [job])[0])
    assert isinstance(engine.run([jobs[1]])[0], JobResult)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_relevance_that_is_not_finite_names_site_and_layer(
    checkpoints: Checkpoints, checkpointing: str
) -> None:
    """
    Given a layer whose value is finite and whose gradient is not (a root at zero)
    If a job asks for sites around it
    I expect an error that names the site and the last layer at fault.
    """
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest((5, 6, 7), ("head", "neuron")))

    def add_a_root_of_zero(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output + (output - output.detach()).abs().sqrt()

    handle = loaded.model.get_submodule("model.layers.1").register_forward_hook(add_a_root_of_zero)
    try:
        (result,) = Engine(loaded, "on" if checkpointing == "on" else "off").run(jobs)
    finally:
        handle.remove()
    assert isinstance(result, EngineError)
    assert "relevance of site 'head' is not finite at layer 1" in str(result)


def test_a_pass_that_fails_is_an_engine_error_and_leaves_a_working_model(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest((5, 6, 7), targets=(TargetRequest(),)))
    engine = Engine(loaded)
    before = run(engine, jobs)[0].tensors[0].values

    def fail(*_: object) -> None:
        raise RuntimeError("a broken kernel")

    handle = loaded.model.get_submodule("model.layers.2.mlp").register_forward_hook(fail)
    with pytest.raises(
        EngineError, match="1 jobs with 3 tokens failed: RuntimeError: a broken kernel"
    ):
        engine.run(jobs)
    handle.remove()
    assert torch.equal(run(engine, jobs)[0].tensors[0].values, before)
