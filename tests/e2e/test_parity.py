"""Results of the service against LXT's own example, run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reltrace
from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.demo import path as demo_path

EXAMPLE = Path(__file__).parents[1] / "reference" / "lxt_example.py"
PROMPTS = [
    "I have 5 cats and 3 dogs. My cats love to play with my",
    "The quick brown fox",
    "My sister has two birds and a fish. The birds sing all day, and every morning the fish "
    "looks at the birds and says nothing at all, because it is a fish.",
    "Naïve café — 日本語 🙂",
]
MODELS = [DEMO_MODEL, "grouped", "tied", "llama3-rope"]
TOLERANCE = 1e-4  # of each layer's largest |R|


@pytest.fixture(scope="session")
def example(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, np.ndarray]]:
    """What LXT gives for every model and prompt."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    paths = {DEMO_MODEL: demo_path(), **checkpoints}
    pairs = [
        option
        for name, path in paths.items()
        for option in ("--model", str(path), "--out", str(folder / f"{name}.npz"))
    ]
    subprocess.run(
        [sys.executable, EXAMPLE, "--input", folder / "prompts.json", *pairs],
        check=True,
        timeout=100,
    )
    return {name: dict(np.load(folder / f"{name}.npz")) for name in paths}


@pytest.fixture(scope="session")
def traces(client: reltrace.Client) -> dict[tuple[str, int], reltrace.Trace]:
    """What the service gives, all prompts of a model in one pass."""
    items = [
        {"prompt": prompt, "model": model, "id": f"{model} {index}", "sites": ["embed", "resid"]}
        for model in MODELS
        for index, prompt in enumerate(PROMPTS)
    ]
    found = {}
    for trace in client.trace_many(items, timeout=100):
        assert isinstance(trace, reltrace.Trace), trace
        model, _, index = str(trace.id).rpartition(" ")
        found[model, int(index)] = trace
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_the_service_equals_the_example(
    example: dict[str, dict[str, np.ndarray]],
    traces: dict[tuple[str, int], reltrace.Trace],
    model: str,
    index: int,
) -> None:
    expected, trace = example[model], traces[model, index]

    assert trace.target.token_id == int(expected[f"token_id_{index}"])
    assert trace.target.logit == pytest.approx(float(expected[f"logit_{index}"]), rel=1e-4)
    assert trace.target.position == len(trace.tokens) - 1
    for site in ("resid", "embed"):
        reference = np.atleast_2d(expected[f"{site}_{index}"].sum(-1))
        values = np.atleast_2d(trace[site])
        assert values.shape == reference.shape
        assert values.dtype == np.float32
        largest = np.abs(reference).max(axis=1)
        assert (largest > 0).all()
        assert (np.abs(values - reference).max(axis=1) <= TOLERANCE * largest).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_number_can_be_traced_back(
    traces: dict[tuple[str, int], reltrace.Trace], model: str
) -> None:
    origin = traces[model, 0].provenance
    assert origin.model == model
    assert origin.revision.startswith("sha256:")
    assert (origin.rule, origin.dtype, origin.attention) == ("attnlrp", "float32", "sdpa")
    assert set(origin.versions) == {"torch", "transformers", "reltrace-worker"}
    assert origin.rule_functions == "fused"
