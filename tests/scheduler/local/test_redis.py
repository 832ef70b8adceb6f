import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local import redis as embedded
from reltrace_scheduler.local.redis import EmbeddedRedis, machine_memory


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


async def test_data_outlive_the_server(tmp_path: Path) -> None:
    first = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await first.start())
    client.set("key", "value")
    client.close()
    await first.stop()

    second = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await second.start())
    assert client.get("key") == b"value"
    assert client.config_get("appendonly") == {"appendonly": "yes"}
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    client.close()
    await second.stop()


async def test_a_data_folder_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_PATIENCE", 0.3)
    first = EmbeddedRedis(tmp_path)
    await first.start()
    try:
        with pytest.raises(StartError, match="is in use by another reltrace"):
            await EmbeddedRedis(tmp_path).start()
    finally:
        await first.stop()


async def test_a_deep_data_folder(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / ("x" * 120))
    client = redis.Redis.from_url(await server.start())
    assert client.ping()
    client.close()
    await server.stop()


async def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="--data"):
        await EmbeddedRedis(tmp_path / "file").start()


async def test_it_is_noticed_when_the_server_dies(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await server.start())
    os.kill(client.info()["process_id"], signal.SIGKILL)
    client.close()
    async with asyncio.timeout(10):
        assert await server.ended() == -signal.SIGKILL
    await server.stop()


async def test_a_damaged_file_is_an_error_that_shows_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("this is no append-only file\n")
    (tmp_path / "appendonlydir").write_text("")  # where Redis 7 keeps it
    with pytest.raises(StartError, match="the embedded Redis did not start: "):
        await EmbeddedRedis(tmp_path).start()


async def test_a_write_that_was_cut_off_costs_nothing_later(tmp_path: Path) -> None:
    """
    Given a file that a SIGKILL cut off in the middle of a command, inside a transaction
    If the server is started, written to, killed and started again
    I expect what was written to be there, and nothing of the transaction.
    """
    first = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await first.start())
    client.set("before", 1)
    client.close()
    await first.stop()
    # One file until Redis 6.2; since 7.0 the last of several takes what is new.
    file = max(tmp_path.rglob("*.aof"), key=lambda path: path.stat().st_mtime_ns)
    with file.open("ab") as tail:
        tail.write(b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$1\r\n1\r\n")
        tail.write(b"*3\r\n$3\r\nSET\r\n$4\r\nrest\r\n$100\r\ncut o")

    second = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await second.start())
    client.set("after", 1)
    os.kill(client.info()["process_id"], signal.SIGKILL)
    client.close()
    assert await second.ended() == -signal.SIGKILL

    third = EmbeddedRedis(tmp_path)
    client = redis.Redis.from_url(await third.start())
    assert client.mget("before", "after", "half", "rest") == [b"1", b"1", None, None]
    client.close()
    await third.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert alive(server)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(server))


PARENT = """
import asyncio, pathlib, redis, sys, time
from reltrace_scheduler.local.redis import EmbeddedRedis
url = asyncio.run(EmbeddedRedis(pathlib.Path(sys.argv[1])).start())
print(redis.Redis.from_url(url).info()["process_id"], flush=True)
time.sleep(60)
"""


async def test_nobody_else_can_read_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    # A folder that lets others in was somebody's choice; the files are not for them all the same.
    for mode in (None, 0o755):
        if mode is not None:
            data.mkdir(mode)
            data.chmod(mode)
        server = EmbeddedRedis(data)
        url = await server.start()
        with redis.Redis.from_url(url) as client:
            client.set("prompt", "secret")
        await server.stop()
        if mode is None:
            assert data.stat().st_mode & 0o777 == 0o700
        files = [file for file in data.rglob("appendonly*") if file.is_file()]
        assert any(b"secret" in file.read_bytes() for file in files)
        assert not any(file.stat().st_mode & 0o077 for file in files)
        shutil.rmtree(data)


@pytest.mark.parametrize(("machine", "expected"), [(8 << 30, 2 << 30), (512 << 20, 256 << 20)])
async def test_it_takes_a_part_of_the_machine_and_evicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: int, expected: int
) -> None:
    monkeypatch.setattr(embedded, "machine_memory", lambda: machine)
    server = EmbeddedRedis(tmp_path)
    with redis.Redis.from_url(await server.start()) as client:
        memory = client.info("memory")
    await server.stop()
    assert memory["maxmemory"] == expected
    assert memory["maxmemory_policy"] == "noeviction"


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_memory()
    assert 256 << 20 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text(f"{whole // 2}\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(embedded, "_CGROUP_LIMITS", (tmp_path / "missing", unlimited, limit))
    assert machine_memory() == whole // 2
