"""Standard streams and disks that do not take what a command writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Run
from fake_server import FakeServer

PROMPT = "My café 猫"


def run(
    server: FakeServer, *arguments: str, given: bytes | None = None, stdout: int = subprocess.PIPE,
    shell: str = '"$@"', **environment: str,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    """Run the command in a process of its own, as `shell` says."""
    command = [sys.executable, "-m", "reltrace", *arguments, "--server", server.address]
    return subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        input=given, stdout=stdout, stderr=subprocess.PIPE, timeout=60,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"' caf?'"),
        ({"PYTHONIOENCODING": "latin-1"}, b"' caf\xe9'"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"' caf?'"),
    ],
    ids=["ascii", "latin-1", "C"],
)
def test_a_terminal_that_lacks_characters(
    server: FakeServer, tmp_path: Path, environment: dict[str, str], shown: bytes
) -> None:
    """
    Given standard output in an encoding without the characters of a prompt
    I expect these replaced, and the files written.
    """
    path = tmp_path / "t.safetensors"
    done = run(server, "trace", "-", "--save", str(path), given=PROMPT.encode(
        "latin-1" if "latin-1" in environment.values() else "utf-8", "replace"
    ), **environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, f"wrote {path}\n".encode())
    assert shown in done.stdout
    assert path.exists()


def test_a_prompt_under_a_locale_that_can_not_decode_it(server: FakeServer) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run(server, "trace", PROMPT, **plain).returncode == 0
    assert server.requests[0].jobs[0].prompt == PROMPT


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (b"\xef\xbb\xbfMy cats\r\n", "My cats"),
        (b"caf\xe9\n", "prompt: standard input is not UTF-8 at byte 3"),
        ("My cats".encode("utf-16"), "prompt: standard input is not UTF-8 at byte 0"),
    ],
    ids=["byte order mark", "latin-1", "utf-16"],
)
def test_what_standard_input_holds(server: FakeServer, given: bytes, prompt: str) -> None:
    done = run(server, "trace", "-", given=given)
    if done.returncode:
        assert done.stderr.decode() == f"reltrace: {prompt}\n"
        assert not server.requests
    else:
        assert server.requests[0].jobs[0].prompt == prompt


def test_a_reader_that_ends_costs_no_file(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    done = run(
        server, "trace", PROMPT, "--save", str(path),
        shell='set -o pipefail; "$@" | true',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"wrote {path}\n".encode())
    assert path.exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_is_full_behind_standard_output(server: FakeServer, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(server, "models", stdout=full.fileno(), PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == b"reltrace: standard output: No space left on device\n"


def test_standard_streams_that_are_closed(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    done = run(server, "trace", PROMPT, "--save", str(path), shell='"$@" <&- >&- 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert path.exists()


@pytest.mark.parametrize("option", ["save", "json", "plot"])
def test_a_file_that_can_not_be_written_is_told_before_the_work(
    command: Run, server: FakeServer, tmp_path: Path, option: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    for path, reason in (
        (tmp_path / "none" / "a.png", f"there is no folder '{tmp_path}/none'"),
        (tmp_path / "folder.png", f"'{tmp_path}/folder.png' is a folder; name a file"),
    ):
        code, _, err = command("trace", PROMPT, f"--{option}", str(path))
        assert (code, err) == (1, f"reltrace: {option}: {reason}\n")
    assert not server.requests


@pytest.mark.parametrize("option", ["save", "json", "plot"])
def test_a_disk_that_is_full_is_told_with_the_file(
    server: FakeServer, tmp_path: Path, option: str
) -> None:
    """With a bound on the size of files instead of a disk, which gives the same kind of error."""
    path = tmp_path / "a.svg"
    done = run(server, "trace", PROMPT, f"--{option}", str(path), shell='ulimit -f 0; "$@"')
    assert (done.returncode, done.stderr.decode()) == (
        1, f"reltrace: {path}: File too large\n",
    )  # fmt: skip
    assert option == "json" or not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cancels_the_job(stuck: FakeServer, number: signal.Signals) -> None:
    """
    Given a command that waits for its trace
    I expect its job to be cancelled and freed on the server when the command is ended.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "reltrace", "trace", "slow", "--server", stuck.address],
        stderr=subprocess.PIPE,
    )
    with stuck.changed:
        assert stuck.changed.wait_for(lambda: stuck.submissions, 30)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, b"")
    stuck.wait_cancelled("s0-0")
