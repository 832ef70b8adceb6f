"""`reltrace generate`: along with the text on a terminal, whole anywhere else."""

import io
import json
import re
import sys
import threading

import pytest
from cli.conftest import Run
from fake_server import FakeServer
from make_text import draft, written
from reltrace_proto.v1 import types_pb2


@pytest.fixture
def terminal(command: Run) -> None:
    command.terminal = True


@pytest.fixture
def writing(server: FakeServer) -> FakeServer:
    """A server whose jobs are lost once, and write something else then."""
    server.drafts = lambda job: [draft(job, [1, 2]), draft(job, [1, 3], attempt=2)]
    server.run = lambda spec, job: written(job, [1, 3, 4])
    return server


def asked(server: FakeServer) -> list[bool]:
    """Whether the jobs were to stream."""
    return [job.generation.stream for request in server.requests for job in request.jobs]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_text_as_it_comes(
    command: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a job that does not end before its first words were printed
    I expect it to end.
    """
    printed, write = threading.Event(), sys.stdout.write

    def note(text: str) -> int:
        if " 1 2" in text:
            printed.set()
        return write(text)

    def hold(spec: types_pb2.JobSpec) -> None:
        assert printed.wait(20)

    monkeypatch.setattr(sys.stdout, "write", note)
    server.drafts = lambda job: [draft(job, [1, 2])]
    server.hold = hold
    server.run = lambda spec, job: written(job, [1, 2, 3])
    assert command("generate", "a") == (0, " 1 2 3\n", "")
    assert asked(server) == [True]


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_a_restarted_text_has_its_own_line(command: Run, writing: FakeServer) -> None:
    assert command("generate", "a") == (0, " 1 2\n 1 3 4\n", "")


@pytest.mark.usefixtures("terminal")
def test_an_error_comes_on_its_own_line(command: Run, server: FakeServer) -> None:
    server.drafts = lambda job: [draft(job, [1, 2])]

    def failed(spec: types_pb2.JobSpec, job: str) -> list[types_pb2.ResultChunk]:
        chunk = types_pb2.ResultChunk(job_id=job, number=1)
        chunk.end.state = types_pb2.JOB_STATE_FAILED
        chunk.end.error.message = "the device is gone"
        return [chunk]

    server.run = failed
    code, out, err = command("generate", "a")
    assert (code, out) == (1, " 1 2\n")
    assert "the device is gone" in err


def test_a_pipe_gets_the_text_alone(command: Run, writing: FakeServer) -> None:
    assert command("generate", "a") == (0, " 1 3 4\n", "")
    assert asked(writing) == [False]


@pytest.mark.usefixtures("terminal")
def test_what_is_shown_whole_is_not_streamed(command: Run, writing: FakeServer) -> None:
    code, out, _ = command("generate", "a", "--json")
    assert (code, json.loads(out)["text"]) == (0, " 1 3 4")
    assert asked(writing) == [False]


def steered_or_not(spec: types_pb2.JobSpec, job: str) -> list[types_pb2.ResultChunk]:
    return written(job, [1, 3, 4] if spec.edits else [5, 6])


def rows(out: str) -> list[list[str]]:
    """The words of a table's lines that hold any, without what a terminal is told beside."""
    return [words for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).splitlines()
            if (words := re.findall(r"[\w.]+", line))]  # fmt: skip


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_both_texts_as_they_come(command: Run, server: FakeServer) -> None:
    server.drafts = lambda job: [draft(job, [1, 2]), draft(job, [1, 3], attempt=2)]
    server.run = steered_or_not
    code, out, _ = command("generate", "a", "--steer", "0:1=4")
    assert code == 0
    assert asked(server) == [True, True]
    assert rows(out)[0] == ["as", "it", "is", "steered"]
    # What stays on the screen is the whole of both.
    assert rows(out)[-1] == ["5", "6", "1", "3", "4"]


def test_a_pipe_gets_both_texts_side_by_side(command: Run, server: FakeServer) -> None:
    server.run = steered_or_not
    code, out, _ = command("generate", "a", "--steer", "0:1=4")
    assert code == 0
    assert asked(server) == [False, False]
    assert rows(out)[-1] == ["5", "6", "1", "3", "4"]


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_the_input_comes_from_standard_input_or_is_a_conversation(
    command: Run, writing: FakeServer, monkeypatch: pytest.MonkeyPatch, on_a_terminal: bool
) -> None:
    """
    Given a worker that has a hint for its reader
    I expect it on standard error, and the text unchanged.
    """

    def run(spec: types_pb2.JobSpec, job: str) -> list[types_pb2.ResultChunk]:
        chunks = written(job, [1, 3])
        chunks[0].header.hints.append("ends in a space")
        return chunks

    writing.run, writing.drafts, command.terminal = run, lambda job: [], on_a_terminal
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"My cats \n"), "utf-8"))
    assert command("generate", "-") == (0, " 1 3\n", "reltrace: ends in a space\n")
    messages = json.dumps([{"role": "user", "content": "Hello"}]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(messages)))
    assert command("generate", "--chat", "-", "--no-add-special-tokens")[0] == 0
    prompt, chat = (request.jobs[0] for request in writing.requests)
    assert prompt.prompt == "My cats "
    assert chat.chat.messages[0].content == "Hello"
