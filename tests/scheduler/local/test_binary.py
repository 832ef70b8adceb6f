"""Which Redis server is taken, and which known faults it has."""

import stat
from pathlib import Path

import pytest
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local import binary
from reltrace_scheduler.local.binary import Binary, find_server
from structlog.testing import capture_logs


def fake_server(folder: Path, name: str, version: str) -> None:
    kind = "Valkey" if name.startswith("valkey") else "Redis"
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "{kind} server v={version} sha=0"\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("redis", "valkey", "taken"),
    [
        (None, "8.0.1", "valkey-server"),
        ("7.2.8", None, "redis-server"),
        ("7.2.8", "8.1.9", "valkey-server"),
        ("7.2.15", "8.1.9", "redis-server"),
        ("7.2.8", "8.0.1", "redis-server"),
        ("6.0.16", "8.0.1", "valkey-server"),
    ],
)
def test_a_mended_server_first_and_none_of_the_wheel_if_there_is_another(
    servers: Path, redis: str | None, valkey: str | None, taken: str
) -> None:
    for name, version in (("redis-server", redis), ("valkey-server", valkey)):
        if version is not None:
            fake_server(servers, name, version)
    assert find_server() == servers / taken


def test_the_whole_path_is_looked_at(servers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Given an environment's folder with an old server, as the wheel leaves it there, before another
    I expect the other.
    """
    first, second = servers / "first", servers / "second"
    for folder, version in ((first, "6.2.14"), (second, "7.2.15")):
        folder.mkdir()
        fake_server(folder, "redis-server", version)
    monkeypatch.setenv("PATH", f"{first}:{second}")
    assert find_server() == second / "redis-server"


@pytest.mark.parametrize(
    ("kind", "version", "mended"),
    [
        ("Redis", (6, 2, 14), False),
        ("Redis", (6, 2, 23), True),
        ("Redis", (7, 0, 15), False),
        ("Redis", (7, 2, 14), False),
        ("Redis", (7, 2, 15), True),
        ("Redis", (9, 0, 0), True),
        ("Valkey", (8, 1, 8), False),
        ("Valkey", (8, 1, 9), True),
        ("Valkey", (9, 2, 0), True),
        ("", (0, 0, 0), False),
    ],
)
def test_which_versions_are_mended(kind: str, version: tuple[int, int, int], mended: bool) -> None:
    assert Binary(Path("/opt/x/redis-server"), kind, version).is_mended is mended
    # A system mends its packages without another number.
    assert Binary(Path("/usr/bin/redis-server"), kind, version).is_mended


def test_a_server_with_known_faults_is_told_once(servers: Path) -> None:
    """
    Given no server on the PATH
    I expect the one in the wheel, which is older than the faults that were found since, and a line
    that says so.
    """
    with capture_logs() as lines:
        assert find_server().name == "redis-server"
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("redis.has_known_faults", "warning")
    assert "CVE-2025-49844" in line["faults"]
    fake_server(servers, "redis-server", "8.8.1")
    with capture_logs() as lines:
        find_server()
    assert lines == []


def test_an_old_server_is_refused(servers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "find_spec", lambda name: None)
    fake_server(servers, "redis-server", "6.0.16")
    with pytest.raises(StartError, match=r"6\.0\.16; reltrace needs Redis 6\.2 or newer"):
        find_server()


def test_no_server_at_all(servers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "find_spec", lambda name: None)
    with pytest.raises(StartError, match="--redis URL"):
        find_server()
