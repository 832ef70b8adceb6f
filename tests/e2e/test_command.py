"""The command line as a person or a script uses it, against the real service."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reltrace_worker.demo import DEMO_MODEL

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"


def reltrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reltrace", *arguments], capture_output=True, text=True, timeout=60
    )


def test_run_writes_pictures_and_json(address: str, tmp_path: Path) -> None:
    png, page, data = tmp_path / "a.png", tmp_path / "a.html", tmp_path / "a.json"
    server = ("--server", address, "--model", DEMO_MODEL)

    first = reltrace("trace", PROMPT, *server, "--plot", str(png), "--json", str(data))
    sites = ("--site", "embed", "--site", "resid")
    second = reltrace("trace", PROMPT, *server, "--plot", str(page), *sites)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "dogs" in first.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"https?://", page.read_text())
    trace = json.loads(data.read_text())
    assert trace["target"]["token"].strip() == "dogs"
    relevance = np.array(trace["relevance"]["resid"])
    assert relevance.shape[1] == len(trace["tokens"]) == len(trace["token_ids"])


def test_json_on_standard_output_is_all_there_is(address: str) -> None:
    done = reltrace("trace", PROMPT, "--server", address, "--model", DEMO_MODEL, "--json", "-")
    assert json.loads(done.stdout)["provenance"]["model"] == DEMO_MODEL


@pytest.mark.parametrize("command", ["models", "status"])
def test_models_and_status(address: str, command: str) -> None:
    table = reltrace(command, "--server", address)
    assert table.returncode == 0, table.stderr
    assert DEMO_MODEL in table.stdout
    data = reltrace(command, "--server", address, "--json").stdout
    assert DEMO_MODEL in json.dumps(json.loads(data))


def test_an_error_is_one_line(address: str) -> None:
    done = reltrace("trace", PROMPT, "--server", address, "--model", "none")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert DEMO_MODEL in done.stderr
