"""What the READMEs and the notebook show runs as it is printed."""

import html
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from demo_model.corpus import held_out
from e2e.conftest import Process, address_in, wait_until
from e2e.printed import ROOT, commands, environment, shell
from nbclient import NotebookClient
from proof.sentences import SENTENCES

PAGES = ["README.md", "client/README.md", "client/NUMBERS.md", "client/BATCH.md"]


def shown(page: str, *what: Any) -> Any:
    """A test's parameters: of README.md on a real model, which takes longer; else on the demo's."""
    if page == "README.md":
        return pytest.param("smollm2", page, *what, marks=pytest.mark.slow)
    return pytest.param("demo", page, *what)


PYTHON = [
    shown(page, number, snippet)
    for page in PAGES
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
]
# What the snippets of README.md print on the real model, one after the other.
SAYS = (
    "dogs",
    r"is Paris\.\nThe .*Turn\(role='user'.*\n.*token=' France'",
    r"attnlrp",
    r"London.* instead of  Paris",
    r"\d+ \d+ ' \w+'|\d+ \d+  ?\w+",
)
# Without the default port, which another test may hold, they need a host, a hub, or a JOB.
NOT_HERE = re.compile(
    r"\breltrace up\b|10\.0\.0|meta-llama|PATH_OR_HUB_ID|JOB|TENANT|node1|\.\.\."
    # These have tests of their own: below, in test_s3.py and in test_atlas.py.
    r"|--watch|s3://|drain|CORPUS|OUT "
)
BUILD = "reltrace atlas build corpus.txt atlas --quiet"
PROMPTS = '{"id": "a", "prompt": "I have 2 birds and 4 fish. My birds"}\n"We have a dog"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, default_server: str) -> Path:
    """Where the snippets are pasted that one model is shown with, one after another."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    (folder / "chat.json").write_text('[{"role": "user", "content": "Who barks?"}]')
    texts = SENTENCES if default_server == "smollm2" else [e.prompt for e in held_out(300, 9)]
    (folder / "corpus.txt").write_text("\n".join(texts))
    np.save(folder / "direction.npy", np.random.default_rng(0).normal(size=128))
    return folder


@pytest.fixture(scope="module", params=["demo"])
def default_server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[str]:
    """`reltrace up` as the pages say it, on the default port; the model."""
    data = tmp_path_factory.mktemp("data")
    service = Process.start(
        data, "reltrace", "up", "--model", request.param, "--data", str(data / "data")
    )
    try:
        assert address_in(service.first_line()) == "127.0.0.1:50051"
        yield str(request.param)
    finally:
        service.stop()


SHELL = [
    shown(page, command)
    for page in PAGES
    for command in commands(page)
    if not NOT_HERE.search(command.partition("#")[0])
    # The demo model has no chat template.
    and ("--chat" not in command or page == "README.md")
    and not command.startswith(("reltrace --token-file", "reltrace-"))
]


WATCHED = [one for page in PAGES for one in commands(page) if "--watch" in one]
DRAINS = [one for page in PAGES for one in commands(page) if "drain" in one]


def test_there_is_something_to_paste() -> None:
    assert {one.values[1] for one in PYTHON} == set(PAGES)
    assert len(SHELL) > 10
    assert len(WATCHED) > 0
    assert len(DRAINS) > 0


@pytest.mark.usefixtures("default_server")
@pytest.mark.parametrize(("default_server", "page", "command"), SHELL, indirect=["default_server"])
def test_a_command_runs_as_printed(page: str, command: str, folder: Path) -> None:
    if command.startswith("reltrace batch") and "--shard" in command:
        command = command.replace(" traces ", " sharded ")
    if command.startswith("reltrace atlas"):
        shell(BUILD, folder)
    out = shell(command, folder)
    if "--plot trace.html" in command:
        assert (folder / "trace.html").read_text().startswith("<!DOCTYPE html>")
    if command.startswith("reltrace batch"):
        assert "failed" not in out


@pytest.mark.usefixtures("default_server")
@pytest.mark.parametrize("command", WATCHED)
def test_a_command_is_watched_as_printed(command: str, folder: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        watching = subprocess.Popen(
            # A shell in the background has Ctrl-C ignored, and so have its children.
            ["bash", "-c", f"trap - INT; exec {command}"],
            cwd=folder,
            stdout=theirs,
            env=environment() | {"TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(theirs)
        alarm = threading.Timer(60, watching.kill)
        alarm.start()
        try:
            # Ends with an error once the command has.
            while b"reltrace-demo" not in screen.read(65536):
                continue
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 0
        finally:
            alarm.cancel()
            watching.kill()
            watching.wait()


@pytest.mark.usefixtures("default_server")
@pytest.mark.parametrize("command", DRAINS)
def test_a_worker_is_drained_as_printed(command: str, folder: Path) -> None:
    """
    Given the worker of `reltrace up`
    If it is drained
    I expect it to, and `up` to start another.
    """
    (before,) = json.loads(shell("reltrace workers --json", folder))
    assert "told to drain" in shell(command.replace("WORKER...", before["id"]), folder)

    def another() -> bool:
        workers = json.loads(shell("reltrace workers --json", folder))
        return [worker["id"] for worker in workers] not in ([], [before["id"]])

    wait_until(another, "another worker takes its place", 60)


@pytest.mark.usefixtures("default_server")
@pytest.mark.parametrize(
    ("default_server", "page", "number", "snippet"), PYTHON, indirect=["default_server"]
)
def test_a_snippet_runs_as_printed(page: str, number: int, snippet: str, folder: Path) -> None:
    if "load_atlas" in snippet:
        shell(BUILD, folder)
    if "load_batch" in snippet:
        shell("reltrace batch prompts.jsonl traces --quiet", folder)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        env=environment() | {"HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    if "trace.plot(" in snippet:
        assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "trace.safetensors").stat().st_size > 0
    if page == "README.md":
        assert re.search(SAYS[number], done.stdout), done.stdout
    if page == "client/NUMBERS.md":
        printed = re.findall(r"^# (\w+: .*)$", snippet, re.MULTILINE)
        assert done.stdout.splitlines() == printed


@pytest.mark.slow
@pytest.mark.usefixtures("default_server")
@pytest.mark.parametrize("default_server", ["smollm2"], indirect=True)
def test_the_notebook_runs(folder: Path) -> None:
    book = nbformat.read(ROOT / "client" / "notebook.ipynb", as_version=4)
    assert all(cell.get("outputs", []) == [] for cell in book.cells), "it is kept without outputs"
    resources = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("RELTRACE_")]:
            monkeypatch.delenv(name)
        NotebookClient(book, timeout=60, kernel_name="python3", resources=resources).execute()
    shown = json.dumps(book)
    assert "Warning" not in shown
    assert "' dogs' (logit" in html.unescape(shown)
    assert "Failure" in shown or "InvalidArgument" in shown


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the README's commands use openssl")
def test_tokens_and_tls_as_printed(tmp_path: Path) -> None:
    """
    Given the README's commands for a scheduler with tokens and TLS, a worker and a client
    If they are pasted one by one, those that go on running each in a terminal of its own
    I expect a trace, and the operator's status.
    """
    section = (ROOT / "README.md").read_text().partition("## Tokens and TLS")[2]
    section = section.partition("\n## ")[0].replace("\\\n", " ")
    lines = re.findall(r"^    (.*)$", section, re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = ["set -e", "trap 'kill $(jobs -p)' EXIT"]
    for line in lines:
        goes_on = re.match(r"reltrace-(worker|scheduler (?!token))", line)
        script.append(line.replace("50051", str(port)) + (" >>log 2>&1 &" if goes_on else ""))
    assert sum(line.endswith("&") for line in script) == 2
    out = shell("\n".join(script), tmp_path, timeout=110)
    assert "Relevance of" in out
    assert "1 worker" in out


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^    make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    help_text = shell("reltrace --help", ROOT)
    for page in PAGES:
        for command in commands(page):
            name = command.replace("reltrace --token-file alice.token --tls-ca ca.pem", "reltrace")
            word = name.split()[1]
            assert word.startswith("-") or word in help_text, command
