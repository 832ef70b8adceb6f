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
from cli.conftest import Run
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
    assert out.startswith("fake: 2 prompts, tokens set to 0, by log-probability\n")
    assert "no rule is best: attnlrp, cp_lrp, gradient, random can not be told apart" in out
    assert "mean ± half of the 95 % interval" in out
    _, out, _ = command("evaluate", corpus, "--limit", "1")
    assert out.startswith("fake: 1 prompt, tokens set to 0, by log-probability\n")
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
        job.prompt: job.targets[0].continuation.text
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
def test_a_plot_that_can_not_be_written_fails_before_the_run(
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
    assert one_line(command, "/dev/null").startswith("input-format: of 'null' is not known")
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


def test_what_is_measured_and_replaced_are_options(
    command: Run, corpus: str, server: FakeServer
) -> None:
    chosen = ("--measure", "probability", "--replace", "id:7", "--keep", "none")
    explained = ("--target", " dogs", "--contrast", "id:3", "--logprob")
    code, out, err = command("evaluate", corpus, *QUICK, *chosen, *explained)
    assert code == 1
    assert "0: measure: a contrast has no probability" in err
    server.requests.clear()
    chosen = ("--measure", "logit", *chosen[2:])
    code, out, err = command("evaluate", corpus, *QUICK, *chosen, *explained)
    assert code == 0
    found = json.loads(out)
    assert (found["measure"], found["replace_id"], found["keep"]) == ("logit", 7, "none")
    jobs = [job for request in server.requests for job in request.jobs]
    traced = next(job for job in jobs if job.sites).targets[0]
    assert (traced.token.text, traced.contrast.id, traced.logprob) == (" dogs", 3, True)
    replaced = [list(job.input_ids.ids) for job in jobs if 7 in job.input_ids.ids]
    assert [7, 7, 7, 7] in replaced or [7, 7, 7, 7, 7] in replaced
    assert not any(job.edits for job in jobs)


def test_a_prompt_that_fails_sets_the_exit_code(
    command: Run, corpus: str, server: FakeServer
) -> None:
    server.faults = lambda spec: [("input", "is too long")] if "cats" in spec.prompt else []
    code, out, err = command("evaluate", corpus, "--points", "2", "--rule", "attnlrp")
    assert code == 1
    assert out.startswith("fake: 1 prompt")
    assert err == "reltrace: prompt 1: prompt: is too long\n"


def test_a_warning_is_printed(
    command: Run, corpus: str, server: FakeServer, tmp_path: Path
) -> None:
    """As `--json` it is part of the result as well."""
    source = tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "We have a dog", "answer": [0]}\n')
    for options in (QUICK, QUICK[:-1]):
        code, _, err = command("evaluate", str(source), *options)
        assert code == 0
        said = "of 1 of 1 prompts the answer has tokens that are kept"
        assert err.startswith(f"reltrace: warning: {said}")
    (warning,) = json.loads(command("evaluate", str(source), *QUICK)[1])["warnings"]
    assert warning.startswith(said)


def test_a_terminal_has_a_bar(command: Run, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("evaluate", corpus, *QUICK)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "2/2" in command("evaluate", corpus, *QUICK)[2]
    assert command("evaluate", corpus, *QUICK, "--quiet")[2] == ""
