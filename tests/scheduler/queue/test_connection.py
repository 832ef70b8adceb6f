import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from certificates import Certificates, make_certificates
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import RedisAddress, has_password, without_secrets
from reltrace_scheduler.queue.client import clients
from reltrace_scheduler.queue.connection import connect, parse_version


@pytest.fixture
async def old_redis() -> AsyncIterator[str]:
    """Answers like a Redis 5: no release of that age can be installed here."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = b"# Server\r\nredis_version:5.0.14\r\n"
        while line := await reader.readline():
            parts = [
                (await reader.readline(), await reader.readline())[1].strip()
                for _ in range(int(line[1:]))
            ]
            if parts[0].upper() == b"INFO":
                writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
            elif parts[0].upper() == b"PING":
                writer.write(b"+PONG\r\n")
            else:
                writer.write(b"-ERR unknown command\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_a_redis_that_is_new_enough(redis_url: str) -> None:
    connection = await connect(redis_url)
    assert parse_version(connection.version) >= (6, 2)
    assert await connection.redis.ping()
    await connection.redis.aclose()


async def test_a_redis_that_is_too_old(old_redis: str) -> None:
    with pytest.raises(StartError, match=r"is 5\.0\.14; reltrace needs 6\.2 or newer"):
        await connect(old_redis)


async def test_nothing_answers() -> None:
    with pytest.raises(StartError, match="can not be reached"):
        await connect(f"redis://127.0.0.1:{free_port()}")


async def test_an_error_does_not_show_the_password() -> None:
    with pytest.raises(StartError) as caught:
        await connect(f"redis://user:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(caught.value)
    assert "user:***@" in str(caught.value)


async def test_no_url() -> None:
    with pytest.raises(StartError, match="--redis localhost"):
        await connect("localhost")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7.0.15", (7, 0)), ("6.2", (6, 2)), ("255.1.2", (255, 1)), ("", (0, 0))],
)
def test_versions(text: str, expected: tuple[int, int]) -> None:
    assert parse_version(text) == expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://app:pw@h:1/0", "redis://app:***@h:1/0"),
        ("redis://pw@h", "redis://***@h"),
        ("redis://:p/w?p#w@h:1", "redis://:***@h:1"),
        ("redis://:p@w://p@w@h", "redis://:***@h"),
        ("redis://h?password=pw&db=1", "redis://h?..."),
        ("unix:///tmp/a@b.sock", "unix:///tmp/a@b.sock"),
        ("unix:///tmp/r.sock?password=pw", "unix:///tmp/r.sock?..."),
        ("user:pw@h", "user:***@h"),
        ("", ""),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert has_password(url) == (url != shown)
    assert shown in repr(RedisAddress(url, password="secret"))
    assert "secret" not in repr(RedisAddress(url, password="secret"))


@pytest.fixture
async def tls_redis(redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[int, Certificates]]:
    """The test run's Redis, behind TLS: the binary that comes along speaks none itself."""
    certificates = make_certificates(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server_cert, certificates.server_key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_unix_connection(redis_url.removeprefix("unix://"))
        await asyncio.gather(pump(reader, inside[1]), pump(inside[0], writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], certificates


async def test_a_redis_behind_tls(tls_redis: tuple[int, Certificates], tmp_path: Path) -> None:
    port, certificates = tls_redis
    connection = await connect(RedisAddress(f"rediss://127.0.0.1:{port}", ca=certificates.ca))
    assert await connection.redis.ping()
    await connection.redis.aclose()
    other = make_certificates(tmp_path / "other")
    for ca in (None, other.ca):
        with pytest.raises(StartError, match=r"can not be reached: .*[Cc]ertificate"):
            await connect(RedisAddress(f"rediss://127.0.0.1:{port}", ca=ca))


def test_a_connection_that_was_closed_meanwhile(redis_url: str) -> None:
    """uvloop raises a bare RuntimeError: whoever waits for errors of Redis would not know it."""

    async def use() -> None:
        client = (await connect(redis_url)).redis
        connection: Any = await client.connection_pool.get_connection()
        connection._writer.transport.abort()
        await asyncio.sleep(0.05)
        with pytest.raises(RedisConnectionError):
            await connection.send_command("PING", check_health=False)
        await connection.disconnect()
        await client.aclose()

    uvloop.run(use())


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "key"),
        ("CONFIG GET", "maxmemory"),
        (b"CONFIG GET", "maxmemory"),
        ("EVALSHA", "0" * 40, 1, "schlüssel", b"\x00\r\n", -3, 0.1, 1e300, ""),
        ("RPUSH", "key", b"short", b"long" * 10_000, "end"),
    ],
)
async def test_commands_are_packed_as_redis_py_packs_them(redis_url: str, command) -> None:
    """
    Given a command with texts, bytes and numbers, long ones too
    I expect the bytes that redis-py's own connection would send, and few pieces.
    """
    (client,) = clients(RedisAddress(redis_url))
    ours = client.connection_pool.make_connection().pack_command(*command)
    assert b"".join(ours) == b"".join(Connection().pack_command(*command))
    assert len(ours) <= 3
    await client.aclose()
