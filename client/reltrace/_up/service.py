"""`reltrace up`: the whole service on this machine, kept running."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from reltrace._up.supervise import Part
from reltrace.client.async_client import AsyncClient
from reltrace.storage.atomic_files import lock_folder
from reltrace.types.errors import MissingDependency, Unavailable, invalid
from reltrace.types.server_info import Model

HOST = "127.0.0.1"

_POLL = 0.2
_REPORT_EVERY = 10.0
# A worker finishes the pass it is in; the scheduler then has nothing left to wait for.
_WORKER_GRACE = 30.0
_SCHEDULER_GRACE = 15.0

# What `up` decides for its parts: the same settings, meant for a part that is started by hand,
# must not reach them. All others do.
_DECIDED = (
    "RELTRACE_LISTEN",
    "RELTRACE_REDIS",
    "RELTRACE_DATA",
    "RELTRACE_SCHEDULER",
    "RELTRACE_MODEL",
    "RELTRACE_WORKER_ID",
    # Everything stays on this machine, where nobody needs a token; the token of a client's
    # environment is for another server.
    "RELTRACE_TOKENS",
    "RELTRACE_TOKEN",
    "RELTRACE_TOKEN_FILE",
    "RELTRACE_LISTEN_TLS_CERT",
    "RELTRACE_LISTEN_TLS_KEY",
    "RELTRACE_LISTEN_TLS_CLIENT_CA",
    "RELTRACE_TLS",
    "RELTRACE_TLS_CA",
    "RELTRACE_TLS_CERT",
    "RELTRACE_TLS_KEY",
    "RELTRACE_TLS_NAME",
    "RELTRACE_REDIS_URL_FILE",
)


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What to start.

    Attributes
    ----------
    models : tuple of str
        Folders, GGUF files or hub ids, or "demo" or "smollm2".
    dtype : str or None
        Number format of weights and passes; None: the worker's default.
    port : int
        0: any free one.
    data : Path
        Folder of the store and the logs.
    workers : int
        Per model.
    redis : str or None
        URL of a Redis to use instead of an own one.
    start_timeout : float
        Seconds until a job must be served.
    """

    models: tuple[str, ...]
    dtype: str | None
    port: int
    data: Path
    workers: int
    redis: str | None
    start_timeout: float


@dataclass(frozen=True, slots=True)
class Ready:
    """What has been started, and serves jobs.

    Attributes
    ----------
    address : str
        Of the scheduler.
    models : tuple of str
        Names of what is served.
    workers : int
        How many there are, of all models together.
    store : str
        Where the jobs are kept, without secrets.
    logs : str
        Folder of the logs.
    """

    address: str
    models: tuple[str, ...]
    workers: int
    store: str
    logs: str

    def __str__(self) -> str:
        kind = "model" if len(self.models) == 1 else "models"
        names = ", ".join(self.models)
        return f"reltrace is ready at {self.address} ({kind} {names}, {self.store})"


def default_data() -> Path:
    """Return the folder for data of this user: under XDG_DATA_HOME, or the platform's own."""
    if configured := os.environ.get("XDG_DATA_HOME"):
        return Path(configured) / "reltrace"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "reltrace"
    return Path.home() / ".local" / "share" / "reltrace"


async def up(
    options: UpOptions, *, announce: Callable[[Ready], None], report: Callable[[str], None]
) -> None:
    """Run the service until SIGINT or SIGTERM.

    Parameters
    ----------
    options : UpOptions
        What to start.
    announce : callable
        Takes what serves jobs, once it does.
    report : callable
        Takes messages on the way; raises nothing.

    Raises
    ------
    TraceError
        If something is missing, in use, or does not come up.
    """
    _check_installed()
    _check_names(options.models)
    port = _free_port(options.port)
    with _own_folder(options.data):
        parts = _parts(options, port, report)
        try:
            await _supervise(options, port, parts, announce, report)
        finally:
            for part in parts:
                part.close()


async def _supervise(
    options: UpOptions,
    port: int,
    parts: Sequence[Part],
    announce: Callable[[Ready], None],
    report: Callable[[str], None],
) -> None:
    stop = asyncio.Event()

    def asked_to_stop() -> None:
        if stop.is_set():
            # Asked twice: somebody is in a hurry.
            for part in parts:
                part.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked_to_stop)
    running = [asyncio.create_task(part.keep_running()) for part in parts]
    stopped = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(_serving(options, f"{HOST}:{port}", report))
    try:
        done, _ = await asyncio.wait(
            [stopped, serving, *running], return_when=asyncio.FIRST_COMPLETED
        )
        if serving in done and not stop.is_set():
            models = serving.result()
            for part in parts:
                part.settled = True
            announce(_ready(options, port, models))
            done, _ = await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for waiting in (stopped, serving):
            waiting.cancel()
        report("stopping")
        scheduler, *workers = parts
        await asyncio.gather(*(worker.stop(_WORKER_GRACE) for worker in workers))
        await scheduler.stop(_SCHEDULER_GRACE)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, stopped, serving, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _serving(options: UpOptions, address: str, report: Callable[[str], None]) -> list[Model]:
    """Wait until every model has a worker."""
    began = said = time.monotonic()
    wanted = len(options.models)
    async with AsyncClient(address, token="", tls=False, retry_timeout=0) as client:
        while True:
            try:
                served = [model for model in await client.models() if model.workers]
            except Unavailable:
                served = []
            # Two revisions may turn out to be one; then all of their workers have to be there.
            workers = sum(model.workers for model in served)
            if len(served) >= wanted or workers >= wanted * options.workers:
                return served
            now = time.monotonic()
            if now - began > options.start_timeout:
                raise Unavailable(
                    f"{len(served)} of {wanted} models are served after {now - began:.0f} s; "
                    f"see {options.data / 'logs'}, or allow more by --start-timeout"
                )
            if now - said > _REPORT_EVERY:
                said = now
                report(f"{len(served)} of {wanted} models are loaded ({now - began:.0f} s)")
            await asyncio.sleep(_POLL)


def _ready(options: UpOptions, port: int, models: Sequence[Model]) -> Ready:
    redis = options.redis
    return Ready(
        address=f"{HOST}:{port}",
        models=tuple(model.name for model in models),
        workers=sum(model.workers for model in models),
        store=f"data in {options.data}" if redis is None else _without_secrets(redis),
        logs=str(options.data / "logs"),
    )


def check_redis_argument(url: str) -> None:
    """Check that the value of `--redis` tells nobody a password.

    Raises
    ------
    InvalidArgument
        If it holds one; every user of the machine can read it there.
    """
    try:
        parsed = urlsplit(url)
        seen = "@" in url if parsed.scheme != "unix" else parsed.password is not None
        seen = seen or "password" in parsed.query
    except ValueError:
        seen = True
    if seen:
        raise invalid(
            "redis",
            "every user of this machine can read a password on the command line; put the URL into "
            "RELTRACE_REDIS, or the password into RELTRACE_REDIS_PASSWORD",
        )


def _without_secrets(url: str) -> str:
    parsed = urlsplit(url)
    return f"Redis at {parsed.hostname or parsed.path}" + (f":{parsed.port}" if parsed.port else "")


def _parts(options: UpOptions, port: int, report: Callable[[str], None]) -> list[Part]:
    """Return the scheduler and, after it, the workers."""
    logs = options.data / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in _DECIDED}
    total = len(options.models) * options.workers
    if total > 1:
        # Each worker would use all cores, and they would take turns at being slow.
        environment.setdefault("RELTRACE_THREADS", str(max(1, (os.cpu_count() or 1) // total)))
    # Not an argument, which every user of the machine can read: the URL may hold a password.
    own = ["--data", str(options.data)] if options.redis is None else []
    redis = {} if options.redis is None else {"RELTRACE_REDIS": options.redis}
    dtype = [] if options.dtype is None else ["--dtype", options.dtype]
    # -P: a file of the folder that `up` is started in must not pass for a module.
    python = [sys.executable, "-P", "-m"]
    address = f"{HOST}:{port}"
    parts = [
        Part(
            "scheduler",
            [*python, "reltrace_scheduler", "--listen", address, *own],
            environment=environment | redis,
            logs=logs,
            report=report,
            own_error="reltrace-scheduler:",
        )
    ]
    for index in range(total):
        model = options.models[index // options.workers]
        parts.append(
            Part(
                f"worker-{index + 1}",
                [*python, "reltrace_worker", "--scheduler", address, "--model", model, *dtype],
                environment=environment,
                logs=logs,
                report=report,
                own_error="reltrace-worker:",
            )
        )
    kinds = ", ".join(dict.fromkeys(options.models))
    report(
        f"starting a scheduler on {address} and {total} worker{'s' if total > 1 else ''} "
        f"({kinds}); logs in {logs}"
    )
    return parts


def _check_installed() -> None:
    packages = {"reltrace_scheduler": "reltrace-scheduler", "reltrace_worker": "reltrace-worker"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise MissingDependency(
            f"`reltrace up` runs {' and '.join(missing)}, which this Python does not have: "
            f"pip install {' '.join(missing)}"
        )


def _check_names(models: Sequence[str]) -> None:
    """Check that no two models get one name from their workers; revisions of the hub may."""
    named: dict[str, str] = {}
    for model in models:
        path = Path(model).expanduser()
        resolved = path.resolve()
        name = path.stem if path.is_file() else resolved.name if path.is_dir() else model
        if name in named:
            raise invalid(
                "model",
                f"{named[name]} and {model} would both be called {name!r}; serve one of them by a "
                "reltrace-worker of its own, with another --name",
            )
        named[name] = model


def _free_port(port: int) -> int:
    """Return `port` if nobody listens on it; for 0, one that is free."""
    # The scheduler's gRPC would share the port (SO_REUSEPORT) and get every other call.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise invalid(
                "port",
                f"{port} can not be used on {HOST} ({error.strerror}); choose another "
                "(0: any free one)",
            ) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _own_folder(data: Path) -> AbstractContextManager[None]:
    """Hold the folder: two stores on one append-only file would destroy it."""
    busy = f"another `reltrace up` uses {data}; stop it, or choose another folder by --data"
    # Prompts are in it.
    return lock_folder(data, "up.lock", "data", busy, mode=0o700)
