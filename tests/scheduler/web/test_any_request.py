"""Whatever is asked over HTTP, the answer is a status that is no fault of ours."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
import redis.asyncio
from damage import damaged_bytes, damages
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from reltrace_proto import telemetry
from reltrace_proto.telemetry import serving_metrics
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.tokens import Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.web.server import serving_page
from scheduler.messages import messages

ALLOWED = {200, 400, 401, 404, 405, 408, 411, 413, 414, 417, 431, 501, 505}
"""500 and 503 are faults of ours."""

VALID = (
    b"GET /state.json?x=1 HTTP/1.1\r\nHost: a\r\nAuthorization: Basic OnNlY3JldA==\r\n"
    b"Content-Length: 3\r\nConnection: close\r\n\r\nabc"
)
NAMES = st.sampled_from(
    "Host Authorization Content-Length Transfer-Encoding Expect Range If-None-Match Accept "
    "Accept-Encoding Upgrade X".split()
)
VALUES = st.one_of(
    st.sampled_from(["a", "-1", "99999999999999999999", "chunked", "100-continue", "Basic", "gzip",
                     "Basic OnNlY3JldA==", "Basic \xff", "bytes=0-", "websocket", "x" * 9000]),
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20),
)  # fmt: skip
PATHS = st.one_of(
    st.sampled_from(["/", "/state.json", "/metrics", "/metrics?name[]=x", "/healthz", "/jobs/.json",
                     "/jobs/%00.json", "/jobs/%ff.json", "/jobs/%ed%a0%80.json", "/../etc/passwd",
                     "//", "*", "http://other/", "/jobs/" + "x" * 9000 + ".json"]),
    st.text(max_size=12).map(lambda text: f"/jobs/{quote(text, safe='')}.json"),
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    method = draw(
        st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "CONNECT", "get", "\t"])
    )
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "X"]))
    headers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=5))
    lines = [f"{method} {draw(PATHS)} {version}", *(f"{name}: {text}" for name, text in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + draw(st.binary(max_size=20))


ANYTHING = st.one_of(requests(), requests(), damaged_bytes(VALID))


@pytest.fixture
async def page(store: redis.asyncio.Redis, settings: Settings) -> AsyncIterator[str]:
    settings = replace(settings, web="127.0.0.1:0")
    async with serving_page("127.0.0.1:0", Store(store, settings), Access()) as url:
        yield url


@contextlib.asynccontextmanager
async def metrics_server(store: redis.asyncio.Redis, tmp_path: Path) -> AsyncIterator[str]:
    with serving_metrics("127.0.0.1:0", CollectorRegistry()) as address:
        yield f"http://{address}"


@contextlib.asynccontextmanager
async def open_page(store: redis.asyncio.Redis, tmp_path: Path) -> AsyncIterator[str]:
    async with serving_page("127.0.0.1:0", Store(store, Settings(web="x")), Access()) as url:
        yield url


@contextlib.asynccontextmanager
async def guarded_page(store: redis.asyncio.Redis, tmp_path: Path) -> AsyncIterator[str]:
    _, entry = make("alice", Role.OPERATOR)
    append(tmp_path / "tokens.toml", entry)
    access = Access(tokens=Tokens(tmp_path / "tokens.toml"))
    async with serving_page("127.0.0.1:0", Store(store, Settings(web="x")), access) as url:
        yield url


async def ask(url: str, request: bytes) -> list[int]:
    """Send bytes and no more; return the statuses that come back until the server hangs up."""
    host, port = url.removeprefix("http://").split(":")
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = b""
        # The server may have hung up before it was asked for all.
        with contextlib.suppress(OSError):
            writer.write(request)
            writer.write_eof()
            answer = await reader.read(-1)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    heads = [part for part in answer.split(b"HTTP/1.")[1:] if part[:2] in (b"0 ", b"1 ")]
    return [int(head[2:5]) for head in heads]


Server = Callable[[redis.asyncio.Redis, Path], AbstractAsyncContextManager[str]]


@pytest.mark.parametrize("server", [open_page, guarded_page, metrics_server])
async def test_any_request_gets_an_answer(
    store: redis.asyncio.Redis, tmp_path: Path, server: Server
) -> None:
    @damages
    @given(ANYTHING)
    def run(request: bytes) -> None:
        sent.append(request)

    sent: list[bytes] = []
    await asyncio.to_thread(run)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(server(store, tmp_path))
        for request in sent:
            assert set(await ask(url, request)) <= ALLOWED, request
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with session.get(f"{url}/") as answer:
            assert answer.status == (401 if server is guarded_page else 200)


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_who_says_nothing_to_the_metrics_is_sent_away(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: bytes
) -> None:
    monkeypatch.setattr(telemetry, "_SILENCE", 0.2)
    with serving_metrics("127.0.0.1:0", CollectorRegistry()) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            silent.sendall(said)
            assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


async def test_any_result_of_a_worker_is_shown_or_said_to_be_none(
    store: redis.asyncio.Redis, page: str
) -> None:
    @damages
    @given(messages(types_pb2.ResultChunk.DESCRIPTOR, st.sampled_from(["resid", "", "<b>", "é"])))
    def run(chunk: types_pb2.ResultChunk) -> None:
        kept.append(chunk)

    kept: list[types_pb2.ResultChunk] = []
    await asyncio.to_thread(run)
    piece = types_pb2.TensorPiece(
        site="resid", dtype=types_pb2.SCALAR_TYPE_FLOAT32, shape=[2, 3], data=bytes(23)
    )
    header = types_pb2.TraceHeader(tokens=["a"] * 3, targets=[types_pb2.ResolvedTarget(token="b")])
    kept.append(types_pb2.ResultChunk(header=header, tensors=[piece]))
    async with aiohttp.ClientSession() as session:
        for chunk in kept:
            await store.set(Keys()("sample_result", "job-0"), chunk.SerializeToString())
            async with session.get(f"{page}/jobs/job-0.json") as answer:
                assert answer.status in (200, 404), await answer.text()
                await answer.read()
