"""Real weights: every site and rule against lxt and plain autograd, and the noise of formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from proof.noise import measure_noise
from proof.sentences import EXAMPLE, SENTENCES
from reference import lxt_example
from reference.loaded import prepare, run
from reference.real_models import PACKAGES, RealModels
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.types.jobs import TraceRequest

# Reading a GGUF file takes transformers half a minute for a vocabulary of 262,144.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RULES = ("attnlrp", "cp_lrp", "gradient")
PROMPTS = (
    EXAMPLE,
    "The capital of France is the city of",
    "When Mary and John went to the store, John gave a drink to",
)
TOLERANCE = 1e-4

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module", params=PACKAGES)
def name(request: pytest.FixtureRequest) -> str:
    """A model."""
    return str(request.param)


@pytest.fixture(scope="module")
def reference(
    name: str, real_models: RealModels, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Arrays]:
    """By rule: what lxt gives, and plain autograd, on the weights that transformers reads."""
    work = tmp_path_factory.mktemp(name)
    jobs = prepare(real_models.loaded(name), *map(TraceRequest, PROMPTS))
    (work / "in.json").write_text(json.dumps([job.token_ids for job in jobs]))
    command = [sys.executable, lxt_example.__file__, "--input", work / "in.json"]
    for rule in RULES:
        command += ["--rule", rule, "--model", real_models.gguf(name)]
        command += ["--out", work / f"{rule}.npz"]
    subprocess.run(command, check=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return {rule: np.load(work / f"{rule}.npz") for rule in RULES}


@pytest.mark.parametrize("rule", RULES)
def test_real_weights_give_what_lxt_gives(
    name: str, rule: str, reference: dict[str, Arrays], real_models: RealModels
) -> None:
    """
    Given a real model, read from its GGUF file by transformers and traced by lxt
    If every site is traced, as it is and reduced
    I expect the same: full traces to 1e-4 of a layer's largest |R|, sums to 1e-4 of what they sum.
    """
    loaded, theirs = real_models.loaded(name), reference[rule]
    specs = [
        TraceRequest(prompt, tuple(SITES), reduction, rule=rule)
        for prompt in PROMPTS
        for reduction in ("full", "token", "feature")
    ]
    for number, result in enumerate(run(Engine(loaded, "off"), prepare(loaded, *specs))):
        index, reduction = number // 3, specs[number].reduction
        (target,) = result.targets
        assert target.token_id == theirs[f"token_id_{index}"]
        assert target.logit == pytest.approx(float(theirs[f"logit_{index}"]), rel=1e-5)
        for tensor in result.tensors:
            wanted, scale = reduced(theirs, tensor.site, index, reduction)
            ours = tensor.values.numpy()
            assert ours.shape == wanted.shape
            assert scale.max() > 1e-3, "the reference is empty"
            wrong = np.abs(ours - wanted) > TOLERANCE * scale
            assert not wrong.any(), (tensor.site, reduction, PROMPTS[index], np.argwhere(wrong)[:3])


def reduced(theirs: Arrays, site: str, index: int, reduction: str) -> tuple[Any, Any]:
    """Return the reference and what its errors are measured by."""
    full = theirs[f"{site}_{index}"]
    # A sum that cancels is as exact as its terms. A head is a sum already.
    terms = theirs[f"head_terms_{index}"] if site == "head" else np.abs(full)
    if reduction == "full":
        return full, np.abs(full).max((-1, -2), keepdims=True)
    if reduction == "token":
        return full.sum(-1), terms.sum(-1)
    # Often the last token's value alone, which may stem from an activation next to 0.
    return full.sum(-2), terms.sum(-2).max(-1, keepdims=True)


def test_the_noise_of_number_formats_and_packs_is_what_is_documented(
    name: str, real_models: RealModels
) -> None:
    """
    Given prompts of a real model
    If they are traced in float32 and bfloat16, in one pack and alone
    I expect float32 to depend on neighbours no more than by rounding, and bfloat16 to stay within
    what client/NUMBERS.md says.
    """
    noise = measure_noise(real_models.loaded(name), SENTENCES[:4], ("token",))
    assert noise.other_token <= 1
    for error in noise.errors:
        if error.compared == "packed and alone, float32":
            assert error.median < 1e-5, error
            assert error.largest < 3e-4, error
        else:
            # Packed and alone are the same to the bit where the processor's library sums each row
            # in an order of its own.
            same = error.compared.startswith("packed") and error.largest == 0
            assert same or 1e-3 < error.median < 0.05, error
            assert error.p95 < 0.3, error
