"""`reltrace up --model`: GGUF files, hub ids and SmolLM2, as a client sees them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import reltrace
from e2e.conftest import Process, address_in
from gguf import GGMLQuantizationType
from reference.checkpoints import PLAIN, TIED, save_checkpoint
from reference.gguf_files import write_gguf

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts `reltrace up` and returns its address."""
    running = []

    def start(*options: str, **settings: str) -> str:
        data = str(tmp_path / f"data-{len(running)}")
        running.append(
            Process.start(
                tmp_path, "reltrace", "up", "--port", "0", "--data", data, *options, **settings
            )
        )
        return address_in(running[-1].first_line())

    yield start
    for process in running:
        assert process.stop() == 0


def batch(address: str, lines: Path, model: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reltrace", "batch", str(lines), str(lines.parent / "out")]
    return subprocess.run(
        [*command, "--server", address, "--model", model],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_gguf_file_and_a_hub_model(up: Callable[..., str], tmp_path: Path) -> None:
    """
    Given a GGUF file, and a hub model of which the cache has two commits
    If both are served in bfloat16, and later the hub's branch has moved
    I expect their traces to name digest and commit, and a batch that was begun to notice.
    """
    path = write_gguf(tmp_path / "Tiny.F16.gguf", PLAIN, GGMLQuantizationType.F16)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    repository = tmp_path / "hub" / "models--acme--tiny"
    for commit, recipe in zip(COMMITS, (TIED, PLAIN), strict=True):
        save_checkpoint(repository / "snapshots" / commit, recipe)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    models = ["--model", str(path), "--model", "acme/tiny"]
    with reltrace.Client(up(*models, "--dtype", "bfloat16", **offline)) as client:
        served = {model.name: model for model in client.models()}
        assert served.keys() == {"Tiny.F16", "acme/tiny"}
        for name, revision in (("Tiny.F16", f"sha256:{digest[:12]}"), ("acme/tiny", COMMITS[0])):
            assert served[name].revision == revision
            provenance = client.trace(PROMPT, model=name, dtype="bfloat16").provenance
            assert (provenance.model, provenance.revision) == (name, revision)
            assert provenance.dtype == "bfloat16"
        assert batch(client.address, lines, "acme/tiny").returncode == 0
    (repository / "refs" / "main").write_text(COMMITS[1])
    with reltrace.Client(up("--model", "acme/tiny", "--dtype", "bfloat16", **offline)) as client:
        assert client.trace(PROMPT).provenance.revision == COMMITS[1]
        lines.write_text(lines.read_text() + json.dumps({"prompt": "Another line"}) + "\n")
        refused = batch(client.address, lines, "acme/tiny")
    assert refused.returncode != 0
    assert f"revision is {COMMITS[1]!r}, and this batch was" in refused.stderr


@pytest.mark.slow
def test_smollm2(up: Callable[..., str]) -> None:
    """
    Given SmolLM2-135M-Instruct out of its package
    If LXT's example sentence is traced
    I expect what LXT's page shows: " dogs", its first token negative, and "cats" and "dogs" carried
    through the middle layers.
    """
    with reltrace.Client(up("--model", "smollm2")) as client:
        trace = client.trace(PROMPT, timeout=600)
    assert trace.tokens[:4] == ["I", " have", " ", "5"], "no BOS before it"
    assert trace.target.token == " dogs"
    assert (trace.provenance.model, trace.provenance.revision) == ("smollm2", "sha256:b179c9523d0e")
    middle = trace.normalized()[10:20].mean(0)
    assert middle[0] < 0
    strongest = {trace.tokens[i] for i in np.argsort(-middle)[:4]}
    assert {" dogs", " cats"} <= strongest
