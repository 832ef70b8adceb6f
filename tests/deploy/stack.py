"""A running stack: Redis, two schedulers, a worker, and a Prometheus that reads them all.

Real processes on this machine. Prometheus has the deployed configuration and alert rules; only its
targets and its haste are the tests' own.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import reltrace
import yaml
from deploy.panels import Prometheus
from deploy.rendering import DEPLOY
from e2e.conftest import Process
from reltrace_scheduler.auth.identity import DEFAULT_TENANT, Role
from reltrace_scheduler.auth.tokens import append, make
from reltrace_scheduler.local.redis import EmbeddedRedis
from waiting import wait_until

MONITORING = DEPLOY / "monitoring"
TENANTS = ("team-a", "team-b")
SCRAPE = 1.0
LEASE = 5.0


@dataclass(frozen=True)
class Stack:
    """What a test does with it.

    Attributes
    ----------
    schedulers : list of str
        Their addresses.
    tokens : dict of str to Path
        Files of clients' tokens, by tenant, and of the worker's and the operator's.
    url : str
        Of the Prometheus.
    """

    schedulers: list[str]
    tokens: dict[str, Path]
    worker: Process
    url: str

    def client(self, tenant: str) -> reltrace.Client:
        return reltrace.Client(",".join(self.schedulers), token=self.tokens[tenant])

    @property
    def prometheus(self) -> Prometheus:
        return Prometheus(self.url, SCRAPE)


def need_prometheus() -> None:
    if shutil.which("prometheus") is None:
        if os.environ.get("CI"):
            pytest.fail("CI asks a live Prometheus: install it there")
        pytest.skip("prometheus is not installed")


@contextmanager
def running(folder: Path) -> Iterator[Stack]:
    """Start everything; what is started ends with the block."""
    with ExitStack() as stack:

        def start(module: str, *options: str) -> Process:
            process = Process.start(folder, module, *options)
            stack.callback(process.stop)
            return process

        store = EmbeddedRedis(folder / "redis")
        redis = asyncio.run(store.start())
        stack.callback(lambda: asyncio.run(store.stop()))
        tokens = _tokens(folder)
        metrics = [f"127.0.0.1:{port}" for port in _free_ports(3)]
        schedulers = [
            start(
                "reltrace_scheduler", "--redis", redis, "--listen", "127.0.0.1:0",
                "--metrics", address, "--tokens", str(folder / "tokens.toml"),
                "--lease", str(LEASE), "--max-lost-leases", "1",
            )
            for address in metrics[:2]
        ]  # fmt: skip
        addresses = [process.first_line().split()[-1] for process in schedulers]
        worker = start(
            "reltrace_worker", "--scheduler", ",".join(addresses), "--model", "demo",
            "--threads", "1", "--metrics", metrics[2], "--token-file", str(tokens["worker"]),
        )  # fmt: skip
        url = stack.enter_context(_prometheus(folder, metrics[:2], metrics[2:]))
        made = Stack(addresses, tokens, worker, url)
        with made.client("operator") as client:
            wait_until(
                lambda: client.status().workers, "the worker connects", seconds=100
            )  # Loading torch takes its time.
        yield made


def _tokens(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, role, tenant in [
        *((tenant, Role.CLIENT, tenant) for tenant in TENANTS),
        ("worker", Role.WORKER, DEFAULT_TENANT),
        ("operator", Role.OPERATOR, DEFAULT_TENANT),
    ]:
        text, entry = make(name, role, tenant)
        append(folder / "tokens.toml", entry)
        files[name] = folder / f"{name}.token"
        files[name].write_text(text)
    return files


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def _prometheus(folder: Path, schedulers: list[str], workers: list[str]) -> Iterator[str]:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE:g}s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    targets = {"reltrace-scheduler": schedulers, "reltrace-worker": workers}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": targets.pop(job["job_name"])}]
    assert not targets
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = _free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (folder / "prometheus.err").open("w") as errors:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            stderr=errors,
        )  # fmt: skip
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "prometheus.err").read_text()
            try:
                return bool(Prometheus(url).get("status/runtimeinfo"))
            except urllib.error.URLError:
                return False

        wait_until(answers, "Prometheus starts")
        yield url
    finally:
        process.terminate()
        process.wait(30)
