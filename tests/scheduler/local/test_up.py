"""`reltrace up`: real processes, with small stand-ins for the scheduler and the worker."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local import children, service
from reltrace_scheduler.local.command import up as command
from typer.testing import CliRunner

PARTS = Path(__file__).parent / "fake_parts"
SECONDS = 20.0


class Up:
    """One `reltrace up`."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        stderr: int = subprocess.PIPE,
        closed: bool = False,
        **environment: str,
    ) -> None:
        self.events_file = folder / "events"
        self.events_file.touch()
        self.data = folder / "data"
        close = "sys.stderr.close(); " if closed else ""
        # Its children are stand-ins, not itself.
        program = (
            f"import sys; sys.path.remove({str(PARTS)!r}); {close}"
            "from reltrace_scheduler.local.__main__ import app; app()"
        )
        command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--data", str(self.data), *options],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(PARTS), os.environ.get("PYTHONPATH")])
                ),
                "EVENTS": str(self.events_file),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # Of its own, so that a test may signal the group as a terminal does.
            start_new_session=True,
        )

    def ready(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert readable, "no ready line"
        return self.process.stdout.readline()

    def events(self) -> list[tuple[str, str, int]]:
        lines = [line.split() for line in self.events_file.read_text().splitlines()]
        return [(line[0], line[1], int(line[2])) for line in lines]

    def started(self, name: str) -> list[int]:
        return [pid for part, event, pid in self.events() if (part, event) == (name, "start")]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    with ExitStack() as stack:

        def start(*options: str, **given: Any) -> Up:
            running = Up(tmp_path, *options, **given)
            stack.callback(running.process.communicate)
            stack.callback(running.process.kill)
            return running

        yield start


def wait_for_end(*pids: int) -> None:
    """Wait until processes that are not our children are gone."""
    for pid in pids:
        try:
            watched = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([watched], [], [], SECONDS)
        finally:
            os.close(watched)
        assert ended, f"process {pid} lives on"


def test_it_serves_and_ends_cleanly(start: Callable[..., Up]) -> None:
    up = start("--workers", "2", "--model", "a", "--model", "b")
    line = up.ready()
    match = re.fullmatch(
        r"reltrace is ready at 127\.0\.0\.1:(\d+) \(models a, b, data in (.*)\)\n", line
    )
    assert match
    assert match.group(2) == str(up.data)
    with grpc.insecure_channel(f"127.0.0.1:{match.group(1)}") as channel:
        stub = trace_pb2_grpc.TraceServiceStub(channel)
        answer = stub.ListModels(trace_pb2.ListModelsRequest(), timeout=SECONDS)
        assert [served.model.name for served in answer.models] == ["a", "b"]
    pids = [pid for _, _, pid in up.events()]
    code, out, err = up.end()
    assert (code, out) == (0, "")
    assert "4 workers (a, b)" in err
    wait_for_end(*pids)
    stopped = [part for part, event, _ in up.events() if event == "stop"]
    assert sorted(stopped[:-1]) == ["worker"] * len(up.started("worker"))
    assert stopped[-1] == "scheduler"
    logs = sorted(path.name for path in (up.data / "logs").iterdir())
    assert logs == ["scheduler.log", *(f"worker-{i}.log" for i in range(1, 5))]


def test_ctrl_c_reaches_the_group_but_the_order_stays(start: Callable[..., Up]) -> None:
    up = start()
    assert "(model demo, data in" in up.ready()
    os.killpg(up.process.pid, signal.SIGINT)
    up.process.communicate(timeout=SECONDS)
    assert up.process.returncode == 0
    assert [part for part, event, _ in up.events() if event == "stop"] == ["worker", "scheduler"]


def test_a_part_that_dies_is_started_again(start: Callable[..., Up]) -> None:
    up = start()
    up.ready()
    assert up.process.stderr is not None
    for part in ("worker", "scheduler"):
        (pid,) = up.started(part)
        os.kill(pid, signal.SIGKILL)
        said, lines = "", []
        while not lines:
            readable, _, _ = select.select([up.process.stderr], [], [], SECONDS)
            assert readable
            # Past Python's own buffer, whose lines `select` does not see.
            said += os.read(up.process.stderr.fileno(), 65536).decode()
            whole = said.splitlines(keepends=True)
            wanted = "was ended by SIGKILL; starting it again"
            lines = [one for one in whole if wanted in one and one.endswith("\n")]
        (line,) = lines
        assert line.startswith(f"reltrace up: {part}")
        watch_until(lambda part=part: len(up.started(part)) == 2, up.events_file)
    assert up.end()[0] == 0


@pytest.mark.parametrize("reader", ["gone", "full disk", "none"])
def test_it_goes_on_where_nobody_reads(start: Callable[..., Up], reader: str) -> None:
    """
    Given nobody who takes what is said on standard error
    I expect a part that dies to be started again, and all to be ended in order.
    """
    reading, writing = os.pipe()
    with Path("/dev/full").open("w") as full:
        stderr = full.fileno() if reader == "full disk" else writing
        up = start(stderr=stderr, closed=reader == "none")
    os.close(writing)
    try:
        up.ready()
    finally:
        os.close(reading)
    (pid,) = up.started("worker")
    os.kill(pid, signal.SIGKILL)
    watch_until(lambda: len(up.started("worker")) == 2, up.events_file)
    assert up.end()[0] == 0
    # The new worker may have been too young to say that it was asked to end.
    assert [part for part, event, _ in up.events() if event == "stop"][-1] == "scheduler"
    wait_for_end(*(pid for _, _, pid in up.events()))


def watch_until(condition: Callable[[], bool], path: Path) -> None:
    """Wait for a change of a file that fulfils a condition."""
    import time

    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.02)


def test_no_part_outlives_it(start: Callable[..., Up]) -> None:
    up = start("--model", "stubborn")
    up.ready()
    pids = [pid for _, _, pid in up.events()]
    assert len(pids) == 2
    up.process.kill()
    wait_for_end(*pids)


def test_a_second_signal_ends_what_does_not_want_to(start: Callable[..., Up]) -> None:
    up = start("--model", "stubborn")
    up.ready()
    assert up.process.stderr is not None
    up.process.send_signal(signal.SIGTERM)
    while "stopping" not in up.process.stderr.readline():
        pass
    code, _, _ = up.end()
    assert code == 0
    wait_for_end(*(pid for _, _, pid in up.events()))


def test_a_part_that_keeps_dying_ends_it(start: Callable[..., Up]) -> None:
    up = start("--model", "crash")
    out, err = up.process.communicate(timeout=SECONDS)
    assert (up.process.returncode, out) == (1, "")
    assert "reltrace: worker-1 ended with exit code 1 3 times before it was ready:" in err
    assert "RuntimeError: the model is on fire" in err
    wait_for_end(*(pid for _, _, pid in up.events()))


def test_an_error_of_the_part_itself_ends_it_at_once(start: Callable[..., Up]) -> None:
    up = start("--model", "missing")
    _, err = up.process.communicate(timeout=SECONDS)
    assert up.process.returncode == 1
    assert "starting it again" not in err
    assert "worker-1 ended with exit code 1 before it was ready" in err
    assert "reltrace-worker: there is no folder 'missing'" in err


def test_two_models_of_one_name_are_refused(start: Callable[..., Up], tmp_path: Path) -> None:
    """Before anything is started: folders and files, as a worker would name them."""
    folder, file = tmp_path / "a" / "checkpoint-500", tmp_path / "checkpoint-500.gguf"
    other = tmp_path / "b" / "checkpoint-500"
    folder.mkdir(parents=True)
    other.mkdir(parents=True)
    file.touch()
    for first, second in ((folder, file), (folder, other)):
        up = start("--model", str(first), "--model", "demo", "--model", str(second))
        out, err = up.process.communicate(timeout=SECONDS)
        assert (up.process.returncode, out) == (1, "")
        assert err.startswith(
            f"reltrace: --model {first} and --model {second} would both be called "
            "'checkpoint-500'; serve "
        )
        assert up.events() == []


def test_a_port_in_use(start: Callable[..., Up]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        up = start("--port", str(port))
        out, err = up.process.communicate(timeout=SECONDS)
    assert (up.process.returncode, out) == (1, "")
    assert err.startswith(f"reltrace: --port {port} can not be used on 127.0.0.1 (Address already")
    assert up.events() == []


def test_a_folder_in_use(start: Callable[..., Up], tmp_path: Path) -> None:
    first = start()
    first.ready()
    second = start()
    _, err = second.process.communicate(timeout=SECONDS)
    assert second.process.returncode == 1
    assert err.startswith("reltrace: another `reltrace up` uses ")
    assert first.end()[0] == 0


def test_what_the_parts_are_told(start: Callable[..., Up]) -> None:
    up = start(
        RELTRACE_REDIS="redis://user:secret@127.0.0.1:7/0",
        RELTRACE_LISTEN="wrong",
        RELTRACE_MODEL="wrong",
        # For another server: on this machine nobody needs a token.
        RELTRACE_TOKENS="/missing",
        RELTRACE_TOKEN="rlt_secret",
        RELTRACE_TLS_CA="/missing",
        RELTRACE_LISTEN_TLS_CERT="/missing",
        RELTRACE_LEASE="7",
    )
    assert up.ready().endswith("(model demo, Redis at redis://user:***@127.0.0.1:7/0)\n")
    assert up.end()[0] == 0
    log = (up.data / "logs" / "scheduler.log").read_text()
    assert "redis redis://user:secret@127.0.0.1:7/0" in log
    assert log.rpartition("told ")[2].split() == ["RELTRACE_LEASE", "RELTRACE_REDIS"]
    arguments = log.split("arguments", 1)[1].split(" redis ", 1)[0]
    results = re.escape(
        f"'--results-url', 'file://{up.data}/results', '--results-above', '67108864'"
    )
    assert re.fullmatch(rf" \['--listen', '127\.0\.0\.1:\d+', {results}\]", arguments)
    assert (up.data / "results").stat().st_mode & 0o777 == 0o700


def test_large_results_go_where_the_user_says(start: Callable[..., Up]) -> None:
    up = start(RELTRACE_RESULTS_URL="s3://bucket")
    up.ready()
    assert up.end()[0] == 0
    assert "--results" not in (up.data / "logs" / "scheduler.log").read_text()


@pytest.mark.parametrize(("options", "told"), [([], False), (["--dtype", "fastest"], True)])
def test_workers_are_told_the_number_format(
    start: Callable[..., Up], options: list[str], told: bool
) -> None:
    up = start(*options)
    up.ready()
    assert up.end()[0] == 0
    log = (up.data / "logs" / "worker-1.log").read_text()
    assert ("'--dtype', 'fastest'" in log) is told


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import asyncio

    monkeypatch.setattr(service, "find_spec", lambda name: None)
    options = service.UpOptions(port=0, data=tmp_path)
    with pytest.raises(StartError, match=r"pip install reltrace-worker$"):
        asyncio.run(service.up(options, announce=print, report=print))


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert service.default_data() == Path("/somewhere/reltrace")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert service.default_data() == Path.home() / ".local" / "share" / "reltrace"


async def test_the_pauses_before_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a part that came up, and from then on ends again and again, once after a longer life
    I expect it to be started again at once, then after pauses that grow to a bound, and at once
    after the longer life.
    """
    monkeypatch.setattr(children, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(children, "_LONGEST_DELAY", 0.2)
    pauses: list[float] = []
    lives = iter([0.0] * 6 + [0.3, 0.0])
    sleep = asyncio.sleep

    class Part(children.Child):
        async def _run_once(self) -> int:
            life = next(lives, None)
            if life is None:
                self.kill()
            else:
                await sleep(life)
            return 1

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    part = Part("part", "none", [], {}, tmp_path, lambda line: None)
    part.was_ready = True
    monkeypatch.setattr(asyncio, "sleep", note)
    await part.keep_running()
    assert pauses == [0, 0.05, 0.1, 0.2, 0.2, 0.2, 0, 0.05]


def test_a_log_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_LOG_BYTES", 100)
    log = children.Log(tmp_path / "a.log")
    for number in range(50):
        log.write(f"line {number}\n".encode())
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"a.log", "a.log.1"}
    assert max(sizes.values()) <= 100
    assert log.tail()[-1] == "line 49"
    assert (tmp_path / "a.log").read_text().endswith("line 49\n")


@pytest.mark.parametrize(
    "url",
    ["redis://:geheim@h:1", "redis://u:geheim@h", "redis://h?password=geheim", "redis://a:[@"],
)
def test_no_password_on_the_command_line(url: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--redis", url, "--data", str(tmp_path / "data")])
    assert done.exit_code == 1
    assert "RELTRACE_REDIS_PASSWORD" in done.output
    assert "geheim" not in done.output
    assert not (tmp_path / "data").exists()
