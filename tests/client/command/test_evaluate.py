"""`reltrace evaluate`: files of prompts, and errors of one line."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import grpc
import pyarrow
import pyarrow.parquet
import pytest
from command.conftest import Run
from fake_server import FakeServer

QUICK = ("--points", "2", "--rule", "attnlrp", "--json")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text('We have a dog\n\n"My cats" love\n')
    return str(path)


def test_a_table(command: Run, corpus: str) -> None:
    code, out, err = command("evaluate", corpus)
    assert (code, err) == (0, "")
    assert out.startswith("fake: 2 prompts, tokens switched off\n")
    assert "mean ± half of the 95 % interval" in out
    _, out, _ = command("evaluate", corpus, "--limit", "1")
    assert out.startswith("fake: 1 prompt, tokens switched off\n")
    assert "±" not in out
    assert "nan" not in out


def test_one_prompt_as_json_is_json(command: Run, corpus: str) -> None:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    _, out, _ = command("evaluate", corpus, "--limit", "1", "--json")
    found = json.loads(out, parse_constant=never)
    assert found["rules"]["attnlrp"]["area"]["margin"] is None


ROWS = [
    {"id": "a", "prompt": "We have a dog", "target": "dog", "answer": "dog"},
    {"id": "b", "prompt": "My cats love", "target": None, "answer": None},
]


def written(folder: Path, ending: str) -> Path:
    path = folder / f"prompts{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ending == ".csv":
        path.write_text("prompt,id,answer,target\nWe have a dog,a,dog,dog\nMy cats love,b,,\n")
    elif ending == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_files_are_those_that_a_batch_reads(
    ending: str, command: Run, server: FakeServer, tmp_path: Path
) -> None:
    code, out, err = command("evaluate", str(written(tmp_path, ending)), *QUICK)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prompts"] == 2
    # The answer of one, and the target that it names.
    assert found["rules"]["attnlrp"]["hit"]["count"] == 1
    targets = {
        job.prompt: job.targets[0].token.text
        for request in server.requests
        for job in request.jobs
        if job.prompt
    }
    assert targets == {"We have a dog": "dog", "My cats love": ""}


def test_standard_input_has_lines_of_json_unless_told(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def piped(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    piped(b'{"prompt": "We have a dog"}\n"My cats love"\n')
    assert json.loads(command("evaluate", "-", *QUICK)[1])["prompts"] == 2
    piped(b"We have a dog\n")
    code, _, err = command("evaluate", "-", *QUICK)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("reltrace: input, line 1: line: is not JSON")
    piped(b"We have a dog\n")
    _, out, _ = command("evaluate", "-", "--input-format", "text", *QUICK)
    assert json.loads(out)["prompts"] == 1


def one_line(command: Run, *arguments: str) -> str:
    code, out, err = command("evaluate", *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    return err.removeprefix("reltrace: ").rstrip("\n")


@pytest.mark.parametrize("plot", ["x.html", "none/x.png"])
def test_a_picture_that_can_not_be_written_is_told_before_the_run(
    plot: str, command: Run, corpus: str, server: FakeServer
) -> None:
    assert one_line(command, corpus, "--plot", plot).startswith("plot: ")
    assert not server.requests


def test_what_can_not_be_read_is_one_line(command: Run, tmp_path: Path, server: FakeServer) -> None:
    (tmp_path / "latin.txt").write_bytes(b"We have a dog\nna\xefve\n")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    said = one_line(command, str(tmp_path / "latin.txt"))
    assert said == "input, line 2: line: is not UTF-8 at byte 2"
    assert one_line(command, str(tmp_path / "empty.txt")) == "prompts: is empty"
    assert one_line(command, "/dev/null", "--input-format", "text") == "prompts: is empty"
    assert one_line(command, "/dev/null").startswith("input-format: of 'null' can not be told")
    missing = str(tmp_path / "none.txt")
    assert one_line(command, missing) == f"input: there is no file {missing!r}"
    assert not server.requests


def test_what_is_wrong_with_all_prompts_is_one_line(
    command: Run, corpus: str, server: FakeServer, tmp_path: Path
) -> None:
    server.faults = lambda spec: [("model", "'nope' is not served; served: fake")]
    server.rejection = grpc.StatusCode.NOT_FOUND
    said = one_line(command, corpus, "--model", "nope")
    assert said == "model: 'nope' is not served; served: fake"


def test_if_every_prompt_has_its_own_fault_there_is_no_table(
    command: Run, corpus: str, server: FakeServer, tmp_path: Path
) -> None:
    server.faults = lambda spec: [("input", "is too long")]
    picture = tmp_path / "x.png"
    said = one_line(command, corpus, "--plot", str(picture))
    assert said == "prompts: none of 2 could be evaluated: 0: prompt: is too long"
    assert not picture.exists()
    code, out, err = command("evaluate", corpus, "--json")
    assert (code, err.count("\n")) == (1, 1)
    assert json.loads(out)["failures"] == dict.fromkeys("01", "prompt: is too long")


def test_a_terminal_has_a_bar(command: Run, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("evaluate", corpus, *QUICK)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "2/2" in command("evaluate", corpus, *QUICK)[2]
    assert command("evaluate", corpus, *QUICK, "--quiet")[2] == ""
