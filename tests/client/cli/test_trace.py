"""`reltrace trace`."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reltrace
from cli.conftest import Run
from fake_labels import FakeLabels
from fake_server import FakeServer

PROMPT = "My cats love to play with my"


def test_trace_shows_the_tokens(command: Run) -> None:
    code, out, err = command("trace", PROMPT)
    assert (code, err) == (0, "")
    assert "Relevance of 'dogs' (logit 3.500): site resid, layer 0" in out
    assert "' love'" in out


def test_trace_passes_its_options_on(command: Run, server: FakeServer) -> None:
    options = ("--site", "embed", "--site", "resid", "--rule", "cp_lrp", "--model", "fake")
    code, out, _ = command("trace", PROMPT, *options, "--target", "cats", "--timeout", "9")
    assert code == 0
    assert "site embed" in out
    (spec,) = server.requests[0].jobs
    assert (list(spec.sites), spec.rule, spec.model) == (["embed", "resid"], "cp_lrp", "fake")
    assert spec.targets[0].token.text == "cats"
    command("trace", PROMPT, "--target", "id:17")
    assert server.requests[1].jobs[0].targets[0].token.id == 17


def test_trace_prints_json_and_nothing_else(command: Run, tmp_path: Path) -> None:
    code, out, _ = command("trace", PROMPT, "--json", "-", "--plot", str(tmp_path / "a.png"))
    assert code == 0
    trace = json.loads(out)
    assert trace["tokens"] == ["<s>", *PROMPT.split()]
    assert len(trace["relevance"]["resid"]) == 4
    assert trace["provenance"]["model"] == "fake"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_trace_takes_every_kind_of_target(command: Run, server: FakeServer) -> None:
    options = ("--target", "cats", "--position", "2", "--contrast", "id:7", "--logprob")
    assert command("trace", PROMPT, *options)[0] == 0
    assert command("trace", PROMPT, "--continuation", " with dogs")[0] == 0
    first, second = (request.jobs[0].targets[0] for request in server.requests)
    assert (first.token.text, first.position, first.contrast.id, first.logprob) == (
        "cats", 2, 7, True,
    )  # fmt: skip
    assert second.continuation.text == " with dogs"
    code, _, err = command("trace", PROMPT, "--target", "cats", "--continuation", "x")
    assert (code, err) == (1, "reltrace: continuation: excludes token, position and contrast\n")


def test_trace_takes_token_ids(command: Run, server: FakeServer) -> None:
    assert command("trace", "--input-ids", "3, 5,7")[0] == 0
    assert list(server.requests[0].jobs[0].input_ids.ids) == [3, 5, 7]
    code, _, err = command("trace", "--input-ids", "3,x")
    assert (code, err[:38]) == (1, "reltrace: input-ids: must be token ids")
    assert command("trace", PROMPT, "--input-ids", "3")[0] == 2


def test_trace_reads_standard_input(
    command: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"My cats\n"), "utf-8"))
    assert command("trace", "-")[0] == 0
    assert server.requests[0].jobs[0].prompt == "My cats"


MESSAGES = [{"role": "user", "content": "Cats or dogs?"}]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_conversation_comes_from_a_file(
    command: Run, server: FakeServer, tmp_path: Path, wrapped: bool
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": MESSAGES} if wrapped else MESSAGES))
    code, out, err = command("trace", "--chat", str(path))
    assert code == 0
    assert err == "reltrace: the conversation was read by a fake template\n"
    assert "Likeliest next: 'dogs' 75.0%, 'cats' 12.5%" in out
    assert re.search(r"^ *2 +user +' or' ", out, re.MULTILINE)
    assert server.requests[0].jobs[0].chat.messages[0].content == "Cats or dogs?"


def test_a_conversation_comes_from_standard_input(
    command: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trace", "tokenize"):
        text = json.dumps(MESSAGES).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert command(name, "--chat", "-")[0] == 0
    assert [request.jobs[0].WhichOneof("input") for request in server.requests] == ["chat"] * 2


def test_an_invalid_conversation(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    for content, said in (
        ("{nope", f"chat: {path} is not JSON"),
        ("5", f"chat: {path} must be a JSON list of messages"),
        ('{"role": "user", "content": "a"}', f"chat: {path} must be a JSON list of messages"),
        ('[{"role": "user"}]', "messages[0].content: is missing"),
    ):
        path.write_text(content)
        code, _, err = command("trace", "--chat", str(path))
        assert (code, err[: len(said) + 10]) == (1, f"reltrace: {said}")
    code, _, err = command("trace", "--chat", str(tmp_path / "none.json"))
    assert (code, err.strip().endswith("can not be read: No such file or directory")) == (1, True)
    for arguments in (["a", "--chat", str(path)], ["a", "--input-ids", "3"], []):
        assert command("trace", *arguments)[0] == 2


def test_trace_saves_a_trace(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    code, _, err = command("trace", PROMPT, "--save", str(path), "--layer", "1", "--layer", "0")
    assert (code, err) == (0, f"wrote {path}\n")
    assert reltrace.Trace.load(path).tokens == ["<s>", *PROMPT.split()]


def test_trace_writes_files(command: Run, tmp_path: Path) -> None:
    page, data = tmp_path / "a.html", tmp_path / "a.json"
    code, out, err = command("trace", PROMPT, "--plot", str(page), "--json", str(data))
    assert code == 0
    assert "Relevance of" in out
    assert err == f"wrote {page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(data.read_text())["target"]["token"] == "dogs"


def test_trace_without_a_value_per_token(command: Run) -> None:
    code, out, _ = command("trace", PROMPT, "--reduce", "feature")
    assert code == 0
    assert "strongest entries of site resid" in out
    assert "feature" in out


def test_trace_labels_the_strongest_neurons(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reltrace, "load_atlas", lambda _: FakeLabels(made_by=("fake", "r1")))
    page, saved = tmp_path / "a.html", tmp_path / "a.safetensors"
    options = ("--atlas", "atlas", "--site", "resid", "--site", "neuron")
    code, out, _ = command(
        "trace", PROMPT, *options, "--reduce", "full", "--plot", str(page), "--save", str(saved)
    )
    assert code == 0
    assert "' love'" in out
    assert "entries of site resid" not in out
    strongest = reltrace.Trace.load(saved).neurons(1)[0]
    first = out.partition("strongest entries of site neuron\n")[2].splitlines()[1]
    assert first.endswith(
        f"{strongest.relevance:+.4g}  neuron {strongest.layer}:{strongest.neuron}"
    )
    assert f'"neuron {strongest.layer}:{strongest.neuron}"' in page.read_text()
    code, out, _ = command("trace", PROMPT, *options, "--reduce", "feature")
    assert code == 0
    assert "entries of site resid" in out
    assert re.search(r"neuron \d:\d\n", out)


ATLAS_ERRORS = {
    (): "atlas: labels neurons and heads: ask for them, with --site neuron or --site head and ",
    ("--site", "neuron"): "atlas: labels neurons and heads: ask for them",
    ("--site", "head", "--reduce", "full", "--plot", "a.png"): "atlas: has labels for .html, not",
    ("--site", "head", "--reduce", "full"): "atlas: nowhere holds none",
}


@pytest.mark.parametrize("arguments", ATLAS_ERRORS, ids=" ".join)
def test_an_atlas_without_use_is_refused_before_the_trace(
    command: Run, server: FakeServer, arguments: tuple[str, ...]
) -> None:
    code, _, err = command("trace", PROMPT, "--atlas", "nowhere", *arguments)
    assert code == 1
    assert err.startswith(f"reltrace: {ATLAS_ERRORS[arguments]}")
    assert err.count("\n") == 1
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", ""], "reltrace: prompt: must not be empty\n"),
        (["trace", PROMPT, "--target", "id:x"], "reltrace: target: after id: comes a token id, "),
        (["trace", PROMPT, "--plot", "a.gif"], "reltrace: plot: must end in .png, .svg, .pdf or "),
        (["trace", PROMPT, "--server", "nowhere"], 'reltrace: address: must be "HOST:PORT"'),
        (
            ["trace", PROMPT, "--plot", "/no/such/folder/a.html"],
            "reltrace: plot: there is no folder",
        ),
    ],
)
def test_errors_are_one_line(command: Run, arguments: list[str], message: str) -> None:
    code, _, err = command(*arguments)
    assert code == 1
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_ctrl_c_ends_a_call(server: FakeServer) -> None:
    import signal
    import threading

    ended = threading.Event()
    started = threading.Event()
    server.hold = lambda spec: (started.set(), ended.wait(20), None)[2]
    code = (
        "import reltrace, signal, sys\n"
        # A shell in the background has it ignored, and so have its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with reltrace.Client(sys.argv[1]) as client:\n"
        "    try:\n"
        "        client.trace('slow')\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    # Leaving the block closes the pipe, however the test ends.
    with subprocess.Popen(
        [sys.executable, "-c", code, server.address], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert started.wait(20)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=20)
        finally:
            ended.set()
            process.kill()
    assert (out, process.returncode) == ("interrupted\n", 0)
