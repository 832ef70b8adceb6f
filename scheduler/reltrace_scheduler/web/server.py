"""Serves the page: its files, and what it shows as JSON."""

import base64
import contextlib
import math
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import structlog
from aiohttp import web
from reltrace_proto.net import host_and_port
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.errors import StartError, UnauthenticatedError
from reltrace_scheduler.queue.gauges import read_cluster
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.queue.trouble import REDIS_ERRORS
from reltrace_scheduler.records import WorkerRecord

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATE_SECONDS = 0.5
"""However many pages are open, Redis is read twice a second."""

_HEADERS = {
    # Nothing is loaded from elsewhere, and no page frames it.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@contextlib.asynccontextmanager
async def serving_page(listen: str, store: Store, access: Access) -> AsyncIterator[str]:
    """Serve the page at HOST:PORT until the block ends; gives its URL.

    With tokens, the browser asks for one of an operator's as the password, under any name; with
    TLS the page has it too.
    """
    host, port = host_and_port("--web", listen)
    access.check(listen, option="--web")
    app = web.Application(middlewares=[_guarded(access)])
    page = _Page(store)
    for path in _FILES:
        app.router.add_get(path, page.file)
    app.router.add_get("/state.json", page.state)
    app.router.add_get("/jobs/{job}.json", page.job)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            tls = None if access.tls is None else access.tls.context()
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            raise StartError(f"--web {listen}: {error.strerror or error}") from error
        scheme, bound = "http" if access.tls is None else "https", runner.addresses[0][1]
        yield f"{scheme}://{listen.rpartition(':')[0]}:{bound}"
    finally:
        await runner.cleanup()


def _guarded(access: Access) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        response: web.StreamResponse
        if not _is_operator(access, request.headers.get("Authorization", "")):
            response = web.Response(
                status=401,
                text="an operator's token is needed, as the password; any name will do\n",
                headers={"WWW-Authenticate": 'Basic realm="reltrace", charset="UTF-8"'},
            )
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}\n")
            except REDIS_ERRORS as error:
                log.warning("page.failed", error=str(error))
                response = web.Response(status=503, text="the store does not answer\n")
        response.headers.update(_HEADERS)
        return response

    return guard


def _is_operator(access: Access, authorization: str) -> bool:
    if access.tokens is None:
        return True
    kind, _, encoded = authorization.partition(" ")
    try:
        token = base64.b64decode(encoded, validate=True).decode().partition(":")[2]
        return kind.lower() == "basic" and access.tokens.find(token).role is Role.OPERATOR
    except (ValueError, UnauthenticatedError):
        return False


class _Page:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._state: dict[str, Any] = {}
        self._read_at = float("-inf")

    async def file(self, request: web.Request) -> web.Response:
        name, content_type = _FILES[request.path]
        text = (files(__package__) / "page" / name).read_text()
        return web.Response(text=text, content_type=content_type)

    async def state(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._read_at > _STATE_SECONDS:
            # Set before the read: requests that come meanwhile get the former state.
            self._read_at = time.monotonic()
            self._state = await self._read()
        return web.json_response(self._state)

    async def _read(self) -> dict[str, Any]:
        # Workers are noted by Redis' clock.
        redis_time = await self._store.shards.all[0].now() / 1000
        cluster = await read_cluster(self._store)
        workers = await self._store.registry.workers()
        return {
            "version": __version__,
            "at": time.time(),
            "queues": [asdict(queue) for queue in cluster.queues],
            "ended": cluster.ended,
            "memory": cluster.memory,
            "workers": [_worker(worker, redis_time) for worker in workers],
            "succeeded": await self._store.recent.rows(ok=True),
            "failed": await self._store.recent.rows(ok=False),
        }

    async def job(self, request: web.Request) -> web.Response:
        data = await self._store.recent.sample_result(request.match_info["job"])
        if data is None:
            raise web.HTTPNotFound(reason="its trace is not kept any more")
        chunk = types_pb2.ResultChunk.FromString(data)
        header = chunk.header
        if not header.targets:
            raise web.HTTPNotFound(reason="it has no trace")
        return web.json_response(
            {
                "tokens": list(header.tokens),
                "target": header.targets[0].token,
                "logit": _finite(header.targets[0].logit),
                "rule": header.provenance.rule,
                "model": header.provenance.model,
                "layers": list(header.layers),
                "sites": [
                    {"site": piece.site, "layered": len(piece.shape) == 2, "values": _rows(piece)}
                    for piece in chunk.tensors
                    # Of the first target, and a value per token: what the map shows.
                    if piece.trace == 0 and _is_per_token(piece, len(header.tokens))
                ],
            }
        )


def _rows(piece: types_pb2.TensorPiece) -> list[list[float | None]]:
    """Return the values of each layer, token by token."""
    rows = struct.iter_unpack(f"<{piece.shape[-1]}f", piece.data)
    return [[_finite(value) for value in row] for row in rows]


def _finite(value: float) -> float | None:
    """Return a number as JSON has it: none for NaN and infinity."""
    return value if math.isfinite(value) else None


def _is_per_token(piece: types_pb2.TensorPiece, tokens: int) -> bool:
    """Tell whether a tensor of a result, which is a worker's word, has a value per token."""
    return (
        piece.dtype == types_pb2.SCALAR_TYPE_FLOAT32
        and not piece.part
        and 1 <= len(piece.shape) <= 2
        and piece.shape[-1] == tokens > 0
        and len(piece.data) == 4 * math.prod(piece.shape)
    )


def _worker(record: WorkerRecord, now: float) -> dict[str, Any]:
    hello = worker_pb2.Hello.FromString(record.hello)
    return {
        "id": record.worker_id,
        "models": [f"{m.name}@{m.revision}" for m in (hello.model, *hello.further_models)],
        "device": hello.device,
        "version": hello.version,
        "leased": record.leased,
        "draining": record.draining,
        "connected": now - record.connected_at,
        "seen": now - record.seen_at,
    }
