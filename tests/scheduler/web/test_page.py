"""The page for operators: who may see it, what it says, and how it looks in a browser."""

import base64
import os
import shutil
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import grpc
import pytest
import redis.asyncio
from certificates import Certificates, make_certificates
from playwright.async_api import Browser, async_playwright
from reltrace_proto.net import SettingError
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2, worker_pb2
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.web.server import serving_page
from scheduler.fake_worker import FakeWorker

TOKENS = ["<s>", " I", " have", " 5", " cats"]


@pytest.fixture
async def shown(
    store: redis.asyncio.Redis, redis_url: str, settings: Settings
) -> AsyncIterator[tuple[str, str]]:
    """A scheduler with a page; gives both addresses."""
    client = redis.asyncio.Redis.from_url(redis_url)
    settings = replace(settings, web="127.0.0.1:0", lease=30.0)
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(Connection(client, "test"), settings))
        page = await stack.enter_async_context(
            serving_page("127.0.0.1:0", Store(client, settings), Access())
        )
        yield address, page
    await client.aclose()


async def run_jobs(address: str) -> list[str]:
    """Have one job succeed and one fail; return their ids."""
    async with grpc.aio.insecure_channel(address) as channel:
        worker = FakeWorker(channel)
        await worker.connect()
        jobs = [types_pb2.JobSpec(prompt="I have 5 cats") for _ in range(3)]
        answer = await trace_pb2_grpc.TraceServiceStub(channel).SubmitJobs(
            trace_pb2.SubmitJobsRequest(jobs=jobs)
        )
        good, bad, _ = leases = await worker.lease(3)
        header = types_pb2.TraceHeader(
            tokens=TOKENS, layers=[0, 1], targets=[types_pb2.ResolvedTarget(token=" dogs", logit=2)]
        )
        header.provenance.rule = "attnlrp"
        values = struct.pack("<10f", *[1, -0.5, 0, 0, 0.125] * 2)
        piece = types_pb2.TensorPiece(
            site="resid", dtype=types_pb2.SCALAR_TYPE_FLOAT32, shape=[2, 5], data=values
        )
        succeeded = types_pb2.JobEnd(state=types_pb2.JOB_STATE_SUCCEEDED)
        failed = types_pb2.JobEnd(
            state=types_pb2.JOB_STATE_FAILED, error=types_pb2.JobError(message="<b>too long</b>")
        )
        chunks = [
            worker_pb2.LeasedChunk(
                attempt=1,
                chunk=types_pb2.ResultChunk(
                    job_id=good.job_id, number=1, header=header, tensors=[piece], end=succeeded
                ),
            ),
            worker_pb2.LeasedChunk(
                attempt=1, chunk=types_pb2.ResultChunk(job_id=bad.job_id, number=1, end=failed)
            ),
        ]
        await worker.send(results=worker_pb2.Results(id=1, chunks=chunks))
        await worker.receive("committed")
        assert len(leases) == 3
        return list(answer.job_ids)


async def test_what_it_says(shown: tuple[str, str]) -> None:
    address, page = shown
    good, bad, running = await run_jobs(address)
    async with aiohttp.ClientSession(page) as http:
        async with http.get("/") as answer:
            assert answer.status == 200
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        async with http.get("/state.json") as answer:
            state = await answer.json()
        (queue,) = state["queues"]
        assert (queue["model"], queue["queued"], queue["leased"]) == ("m", 0, 1)
        (worker,) = state["workers"]
        assert (worker["id"], worker["leased"]) == ("w1", 1)
        assert state["ended"] == {"SUCCEEDED": 1, "FAILED": 1}
        (row,) = state["succeeded"]
        assert (row["job"], row["text"], row["sampled"]) == (good, "".join(TOKENS), True)
        (row,) = state["failed"]
        assert (row["job"], row["error"], row["sampled"]) == (bad, "<b>too long</b>", False)
        async with http.get(f"/jobs/{good}.json") as answer:
            trace = await answer.json()
        assert (trace["target"], trace["tokens"]) == (" dogs", TOKENS)
        (site,) = trace["sites"]
        assert (site["site"], site["layered"]) == ("resid", True)
        assert site["values"] == [[1, -0.5, 0, 0, 0.125]] * 2
        async with http.get(f"/jobs/{running}.json") as answer:
            assert answer.status == 404
        async with http.post("/state.json") as answer:
            assert answer.status == 405
        async with http.get("/../server.py") as answer:
            assert answer.status == 404


async def test_only_operators_see_it(
    store: redis.asyncio.Redis, settings: Settings, tmp_path: Path
) -> None:
    """
    Given a scheduler with tokens
    I expect the page for an operator's token as the password, and nothing without.
    """
    file, tokens = tmp_path / "tokens.toml", {}
    for role in (Role.OPERATOR, Role.CLIENT):
        tokens[role], entry = make(role.value, role)
        append(file, entry)
    access = Access(tokens=Tokens(file))
    async with serving_page("127.0.0.1:0", Store(store, settings), access) as page:
        for password, status in [
            (None, 401), ("", 401), ("wrong", 401), (tokens[Role.CLIENT], 401),
            (tokens[Role.OPERATOR], 200),
        ]:  # fmt: skip
            login = base64.b64encode(f"me:{password}".encode()).decode()
            headers = {} if password is None else {"Authorization": f"Basic {login}"}
            async with (
                aiohttp.ClientSession(page, headers=headers) as http,
                http.get("/state.json") as answer,
            ):
                assert answer.status == status


async def test_its_certificate_is_read_again(
    store: redis.asyncio.Redis, settings: Settings, tmp_path: Path
) -> None:
    """
    Given a page under TLS whose files are replaced while it is served
    I expect the old pair while the new one is incomplete, then the new one, and for clients too
    those of the new authority only.
    """
    old, new = (make_certificates(tmp_path / name) for name in ("old", "new"))
    served = tmp_path / "served"
    served.mkdir()
    tls = ServerTls(*(served / name for name in ("cert.pem", "key.pem", "ca.pem")))

    async def status(server: Certificates, client: Certificates) -> int:
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(client.client_cert, client.client_key)
        async with aiohttp.ClientSession(page) as http, http.get("/", ssl=context) as answer:
            return answer.status

    def serve(files: Certificates) -> None:
        shutil.copy(files.server_key, served / "key.pem")
        shutil.copy(files.ca, served / "ca.pem")
        shutil.copy(files.server_cert, served / "cert.pem")

    serve(old)
    async with serving_page("127.0.0.1:0", Store(store, settings), Access(tls=tls)) as page:
        assert await status(old, old) == 200
        shutil.copy(new.server_cert, served / "cert.pem")
        assert await status(old, old) == 200
        serve(new)
        assert await status(new, new) == 200
        for server, client in ((old, new), (new, old)):
            with pytest.raises(aiohttp.ClientError):
                await status(server, client)


async def test_it_is_not_shown_to_strangers(store: redis.asyncio.Redis, settings: Settings) -> None:
    for listen, said in [
        ("0.0.0.0:0", "--web 0.0.0.0:0: other machines can reach"),
        ("nowhere", "--web nowhere: must be HOST:PORT"),
        ("127.0.0.1:x", "must be HOST:PORT"),
    ]:
        with pytest.raises((StartError, SettingError), match=said):
            async with serving_page(listen, Store(store, settings), Access()):
                pass


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no chromium: .ci/run installs it")
        pytest.skip("there is no chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def test_it_is_drawn(shown: tuple[str, str], browser: Browser, tmp_path: Path) -> None:
    """
    Given a cluster with a job that runs, one that succeeded and one that failed
    If an operator opens the page and clicks the prompt
    I expect all of them, the failure's text as text, and the trace as a picture.
    """
    address, url = shown
    page = await browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    await page.goto(url)
    await page.wait_for_selector("text=No worker is connected: jobs wait for one.")
    good, _, _ = await run_jobs(address)
    await page.wait_for_selector("#succeeded button")
    assert await page.inner_text("#failed td.text") == "<b>too long</b>"
    assert "w1" in await page.inner_text("#workers")
    assert await page.inner_text("#queues td.n") == "0"
    await page.click("#succeeded button")
    await page.wait_for_selector("#words span")
    assert good in await page.inner_text("#trace-title")
    assert await page.inner_text("#words") == "".join(TOKENS)
    # The first token speaks for the prediction, the second against it, half as much.
    pixel = "(x) => Array.from(canvas.getContext('2d').getImageData(x, 1, 1, 1).data.slice(0, 3))"
    cell = await page.evaluate("canvas.width / 5")
    assert await page.evaluate(pixel, cell / 2) == [178, 24, 43]
    assert await page.evaluate(pixel, 1.5 * cell) == [144, 179, 214]
    assert await page.evaluate(pixel, 2.5 * cell) == [255, 255, 255]
    box = await page.locator("#canvas").bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + 5, box["y"] + 5)
    assert 'layer 1, token 0 "<s>": R = 1.000' in await page.inner_text("#readout")
    picture = tmp_path / "page.png"
    await page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    assert faults == []
