"""Text of models and servers can not control a terminal, and is not markup."""

from __future__ import annotations

import io
import logging

import pytest
from cli.conftest import Run
from fake_server import FakeServer
from make_text import written
from reltrace.cli import output
from reltrace_proto.v1 import types_pb2
from rich.console import Console


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\r\x9b2Jb\u202e", "a\\r\\x9b2Jb\\u202e"),
        ("two\nlines\tand 👩\u200d🚀\u3000x", "two\nlines\tand 👩\u200d🚀\u3000x"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert output.safe(text) == shown


def test_table_cells_are_not_markup() -> None:
    file = io.StringIO()
    Console(file=file, width=80).print(output.table(("model", "n"), [("x[/bold]\x1b[2J", 3)]))
    assert "x[/bold]\\x1b[2J" in file.getvalue()


def test_a_model_name_may_hold_markup_and_control_characters(
    command: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    server.served = [("x[/bold]\x1b[2J", "[red]", 1)]
    code, out, err = command("models")
    assert (code, err) == (0, "")
    assert out.count("x[/bold]") == 2
    command.terminal = True
    out = command("models")[1]
    assert out.count("x[/bold]\\x1b[2J") == 2
    assert "\x1b[2J" not in out


def test_what_is_logged_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("reltrace", logging.WARNING, "", 0, "%s away", ("\x1b[2J",), None)
    output.LogHandler().emit(record)
    assert capsys.readouterr().err == "reltrace: \\x1b[2J away\n"


def test_text_on_a_terminal_is_escaped_and_a_pipe_gets_it_as_it_is(
    command: Run, server: FakeServer
) -> None:
    def run(spec: types_pb2.JobSpec, job: str) -> list[types_pb2.ResultChunk]:
        chunks = written(job, [1])
        chunks[0].generated.text = "\x1b[2Jno"
        return chunks

    server.run = run
    assert command("generate", "a")[1] == "\x1b[2Jno\n"
    server.drafts = lambda job: [
        types_pb2.Draft(job_id=job, attempt=1, token_ids=[1], tokens=["a"], text="\x1b[2Jno")
    ]
    command.terminal = True
    assert command("generate", "a")[1] == "\\x1b[2Jno\n"
