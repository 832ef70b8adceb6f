"""Serves the page: its files, and what it shows as JSON."""

import base64
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import structlog
from aiohttp import web
from redis.exceptions import RedisError
from reltrace_proto.v1 import types_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.errors import StartError, UnauthenticatedError
from reltrace_scheduler.queue.gauges import Gauges
from reltrace_scheduler.queue.store import Store

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_FRESH = 0.5
"""Seconds: however many look, the store is asked twice a second."""

_HEADERS = {
    # Nothing from elsewhere, and nobody frames it.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


@contextlib.asynccontextmanager
async def showing(listen: str, store: Store, access: Access) -> AsyncIterator[str]:
    """Serve the page until the block ends; gives its URL.

    Parameters
    ----------
    listen : str
        ``HOST:PORT``; port 0: any free one.
    access : Access
        With tokens, the browser asks for one of an operator's as the password, under any name;
        with TLS the page has it too.

    Raises
    ------
    StartError
        The address can not be bound, or may not be served like this.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise StartError(f"--web {listen}: must be HOST:PORT, such as 127.0.0.1:8080")
    access.check(listen, option="--web")
    app = web.Application(middlewares=[_guarded(access)])
    page = _Page(store)
    for name in _FILES:
        app.router.add_get(f"/{name}", page.file)
    app.router.add_get("/state.json", page.state)
    app.router.add_get("/jobs/{job}.json", page.job)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=_tls(access))
        try:
            await site.start()
        except OSError as error:
            raise StartError(f"--web {listen}: {error.strerror or error}") from error
        bound = runner.addresses[0][1]
        yield f"{'http' if access.tls is None else 'https'}://{host}:{bound}"
    finally:
        await runner.cleanup()


def _tls(access: Access) -> ssl.SSLContext | None:
    if access.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(access.tls.cert, access.tls.key)
    if access.tls.client_ca is not None:
        context.load_verify_locations(access.tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _guarded(access: Access) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _may_look(access, request.headers.get("Authorization", "")):
            response: web.StreamResponse = web.Response(
                status=401,
                text="an operator's token is needed, as the password; any name will do\n",
                headers={"WWW-Authenticate": 'Basic realm="reltrace", charset="UTF-8"'},
            )
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}\n")
            except (RedisError, OSError) as error:
                log.warning("page.fails", error=str(error))
                response = web.Response(status=503, text="the store does not answer\n")
        response.headers.update(_HEADERS)
        return response

    return guard


def _may_look(access: Access, authorization: str) -> bool:
    if access.tokens is None:
        return True
    kind, _, encoded = authorization.partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        token = base64.b64decode(encoded, validate=True).decode().partition(":")[2]
        return Role.OPERATOR in access.tokens.find(token).roles
    except (ValueError, UnauthenticatedError):
        return False


class _Page:
    """What the page asks for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._gauges = Gauges(store)
        self._state: dict[str, Any] = {}
        self._read_at = float("-inf")

    async def file(self, request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        content = files(__package__) / "page" / (name or "page.html")
        return web.Response(text=content.read_text(), content_type=_FILES[name])

    async def state(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._read_at > _FRESH:
            # Before: others that ask meanwhile get what was there.
            self._read_at = time.monotonic()
            self._state = await self._read()
        return web.json_response(self._state)

    async def _read(self) -> dict[str, Any]:
        now = time.time()
        cluster = await self._gauges.read()
        workers = await self._store.registry.workers(seen_since=now - self._store.settings.lease)
        return {
            "version": __version__,
            "at": now,
            "queues": [asdict(queue) for queue in cluster.queues],
            "models": cluster.workers,
            "ended": cluster.ended,
            "memory": cluster.memory,
            "workers": [
                {
                    "id": worker.worker_id,
                    "models": [f"{model.name}@{model.revision}" for model in worker.models],
                    "device": worker.device,
                    "version": worker.version,
                    "leased": worker.leased,
                    "draining": worker.draining,
                    "connected": now - worker.connected_at,
                    "seen": now - worker.seen_at,
                }
                for worker in workers
            ],
            "recent": await self._store.recent.rows(ok=True),
            "mishaps": await self._store.recent.rows(ok=False),
        }

    async def job(self, request: web.Request) -> web.Response:
        data = await self._store.recent.sample_result(request.match_info["job"])
        if data is None:
            raise web.HTTPNotFound(reason="its trace is not kept any more")
        chunk = types_pb2.ResultChunk.FromString(data)
        return web.json_response(
            {
                "tokens": list(chunk.header.tokens),
                "target": chunk.header.targets[0].token,
                "logit": chunk.header.targets[0].logit,
                "rule": chunk.header.provenance.rule,
                "model": chunk.header.provenance.model,
                "layers": list(chunk.header.layers),
                "sites": [
                    {
                        "site": piece.site,
                        "shape": list(piece.shape),
                        "values": base64.b64encode(piece.data).decode(),
                    }
                    for piece in chunk.tensors
                    # Of the first target, and a value per token: what a picture shows.
                    if piece.trace == 0 and _per_token(piece, chunk.header)
                ],
            }
        )


def _per_token(piece: types_pb2.TensorPiece, header: types_pb2.TraceHeader) -> bool:
    return (
        piece.dtype == types_pb2.SCALAR_TYPE_FLOAT32
        and not piece.part
        and 1 <= len(piece.shape) <= 2
        and piece.shape[-1] == len(header.tokens)
    )
