"""The engine against LXT's example, which runs prompt by prompt in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from reference import lxt_example
from reference.checkpoints import LXT_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.types.jobs import TraceRequest

SITES = ("embed", "resid")
# What is summed over: features, or tokens.
AXIS = {"embed": -1, "resid": -1, "head": -2, "neuron": -2}


# A rule and a model.
CASES = [("attnlrp", name) for name in ("grouped", "tied", "llama3_rope", *LXT_RECIPES)] + [
    ("cp_lrp", name) for name in ("grouped", *LXT_RECIPES)
]


@pytest.fixture(scope="module")
def examples(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """What the example gives, by rule and model; it has a process for each rule and family."""
    work = tmp_path_factory.mktemp("examples")
    prompts = work / "in.json"
    prompts.write_text(json.dumps(PROMPTS))
    command = [sys.executable, lxt_example.__file__, "--input", prompts]
    outs = {}
    for rule, name in CASES:
        out = outs[rule, name] = work / f"{rule}_{name}.npz"
        command += ["--rule", rule, "--model", checkpoints.folder(name), "--out", out]
    subprocess.run(command, check=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return {key: np.load(path) for key, path in outs.items()}


def assert_close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    """1e-4 of each layer's largest |R|."""
    assert ours.shape == theirs.shape, what
    largest = np.abs(theirs).max(-1, keepdims=True)
    assert largest.min() > 1e-3, f"{what}: the reference is empty"
    error = (np.abs(ours - theirs) / largest).max()
    assert error < 1e-4, f"{what}: {error}"


@pytest.mark.parametrize(("rule", "name"), CASES)
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_pack_equals_the_example_run_prompt_by_prompt(
    checkpoints: Checkpoints, examples: Any, name: str, rule: str, checkpointing: Any
) -> None:
    """
    Given prompts of many lengths
    If they are traced in one pack
    I expect what LXT's example gives for each of them alone.
    """
    theirs = examples[rule, name]
    loaded = checkpoints.loaded(name)
    engine = Engine(loaded, checkpointing)
    tokens = run(
        engine, prepare(loaded, *(TraceRequest(p, sites=SITES, rule=rule) for p in PROMPTS))
    )
    features = run(
        engine,
        prepare(
            loaded,
            *(TraceRequest(p, ("head", "neuron"), reduction="feature", rule=rule) for p in PROMPTS),
        ),
    )
    for index, (token, feature) in enumerate(zip(tokens, features, strict=True)):
        (target,) = token.targets
        assert target.token_id == theirs[f"token_id_{index}"]
        assert target.logit == pytest.approx(float(theirs[f"logit_{index}"]), rel=1e-5)
        for tensor in (*token.tensors, *feature.tensors):
            what = f"{name} {rule} {tensor.site} of prompt {index}"
            reduced = theirs[f"{tensor.site}_{index}"].sum(AXIS[tensor.site])
            assert_close(tensor.values.numpy(), reduced, what)
