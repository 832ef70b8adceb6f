"""What the stack starts, started here: the secrets, the checks of health, Redis after a crash."""

import base64
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import reltrace
from deploy.rendering import DEPLOY, KUBERNETES, make_secrets
from deploy.test_compose import SERVICES, filled
from deploy.test_containers import environment as image_environment
from redis.backoff import NoBackoff
from redis.retry import Retry
from reltrace_scheduler.auth.tokens import parse
from reltrace_scheduler.local.binary import find_server
from reltrace_worker.observability.metrics import PassStats, WorkerCollector, exporting
from waiting import wait_until

HEALTH = DEPLOY / "containers" / "health.py"
REDIS = KUBERNETES / "components" / "redis"


def test_secrets_are_for_their_owner_and_for_containers(secrets: Path) -> None:
    # A container's user, who is another, reads the files; nobody else gets as far as to them.
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert all(path.stat().st_mode & 0o004 for path in secrets.iterdir())
    entries = parse((secrets / "tokens.toml").read_text())
    assert {entry.name: str(entry.role) for entry in entries} == {
        "client": "client", "operator": "operator", "worker": "worker",
    }  # fmt: skip
    assert len((secrets / "redis-password").read_text().strip()) == 64


def test_secrets_that_are_there_stay(secrets: Path) -> None:
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    make_secrets(secrets, "another.name")
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before


def test_a_token_that_is_not_made_leaves_nothing_half(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", DEPLOY / "secrets.sh", tmp_path, "name"],
        env=os.environ | {"RELTRACE_SCHEDULER": "sh -c 'echo broken >&2; exit 3'"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert not [path for path in tmp_path.iterdir() if "token" in path.name and path.stat().st_size]


@pytest.fixture
def store(secrets: Path, tmp_path: Path) -> Iterator["Store"]:
    store = Store(tmp_path / "data", secrets / "redis-password")
    yield store
    store.kill()


class Store:
    """Redis as the stack starts it, but for the folder and the port."""

    def __init__(self, data: Path, password: Path) -> None:
        data.mkdir()
        bin_folder = data.parent / "bin"
        bin_folder.mkdir()
        # One binary: it looks at the name that it is called by.
        for name in ("redis-server", "redis-check-aof"):
            (bin_folder / name).symlink_to(Path(find_server()).resolve())
        config = (REDIS / "redis.conf").read_text()
        assert "dir /data\n" in config
        (data.parent / "redis.conf").write_text(
            config.replace("dir /data\n", f"dir {data}\nport 0\nunixsocket {data}/socket\n")
        )
        self.data = data
        self.password = password
        self.environment = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "REDIS_PASSWORD_FILE": str(password),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "redis.Redis":
        self.process = subprocess.Popen(
            ["sh", REDIS / "start.sh", self.data.parent / "redis.conf"],
            cwd=self.data,
            env=self.environment,
            stdout=subprocess.DEVNULL,
        )
        client = self.client(self.password.read_text().strip())

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_until(answers, "Redis starts")
        return client

    def client(self, password: str | None) -> "redis.Redis":
        return redis.Redis(
            unix_socket_path=f"{self.data}/socket",
            password=password,
            retry=Retry(NoBackoff(), 0),
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            (self.data / "socket").unlink(missing_ok=True)


def test_redis_asks_for_its_password_and_shows_it_to_nobody(store: Store) -> None:
    store.start()
    with pytest.raises(redis.AuthenticationError):
        store.client(None).ping()
    assert store.process is not None
    line = Path(f"/proc/{store.process.pid}/cmdline").read_bytes()
    assert store.password.read_text().strip().encode() not in line
    assert b"redis" in line


def test_redis_does_not_start_without_a_password(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = subprocess.run(
        ["sh", REDIS / "start.sh", tmp_path / "redis.conf"],
        cwd=store.data,
        env=store.environment | {"REDIS_PASSWORD_FILE": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "is empty" in done.stderr


def test_half_a_transaction_costs_nothing_that_is_written_after_it(store: Store) -> None:
    store.start().set("before", "1")
    store.kill()
    (file,) = [path for path in store.data.rglob("*.aof") if path.is_file()]
    with file.open("ab") as end:
        end.write(
            b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$1\r\n1\r\n*3\r\n$3\r\nSE"
        )
    store.start().set("after", "1")
    store.kill()
    assert store.start().mget("before", "half", "after") == [b"1", None, b"1"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def health(check: str, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, HEALTH, check],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def ask_page(port: int, secrets: Path, token: str, encrypted: bool) -> int:
    """Ask for the page with a token as the password; return the status."""
    login = base64.b64encode(f"me:{(secrets / token).read_text().strip()}".encode()).decode()
    request = urllib.request.Request(
        f"{'https' if encrypted else 'http'}://localhost:{port}/state.json",
        headers={"Authorization": f"Basic {login}"},
    )
    trust = ssl.create_default_context(cafile=str(secrets / "server.pem"))
    try:
        with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("encrypted", [True, False], ids=["tls", "plain"])
def test_a_scheduler_of_the_stack(
    encrypted: bool, store: Store, secrets: Path, tmp_path: Path
) -> None:
    """
    Given the variables of the image and of compose.yaml
    I expect a scheduler that serves clients, shows operators its page, logs JSON, and whose checks
    tell a Redis that is away from a death.
    """
    store.start()
    environment = {
        name: re.sub("^/run/secrets", str(secrets), filled(value))
        for name, value in {
            **image_environment("scheduler"),
            **SERVICES["scheduler-1"]["environment"],
        }.items()
        if name not in {"RELTRACE_METRICS", "PATH"} and value is not None
    }
    port, page = free_port(), free_port()
    environment |= {
        "RELTRACE_LISTEN": f"0.0.0.0:{port}",
        "RELTRACE_WEB": f"0.0.0.0:{page}",
        "RELTRACE_REDIS": f"unix://{store.data}/socket",
    }
    if not encrypted:
        environment = {
            name: value for name, value in environment.items() if "_TLS_" not in name
        } | {"RELTRACE_LISTEN_INSECURE": "1"}
    environment = os.environ | environment
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "reltrace_scheduler"], env=environment, stderr=errors
        )
    try:
        wait_until(lambda: health("ready", environment) == (0, ""), "the scheduler serves")
        tls = reltrace.TlsOptions(ca=secrets / "server.pem") if encrypted else None
        with reltrace.Client(
            f"127.0.0.1:{port}", token=secrets / "client.token", tls=tls
        ) as client:
            assert client.models() == []
        for role, status in (("client", 401), ("operator", 200)):
            assert ask_page(page, secrets, f"{role}.token", encrypted) == status
        if encrypted:
            store.kill()
            wait_until(lambda: health("ready", environment)[0] == 1, "Redis is missed")
            assert health("alive", environment) == (0, "")
            wait_until(log.read_text, "the scheduler says that Redis is away")
            assert all("event" in json.loads(line) for line in log.read_text().splitlines())
    finally:
        process.kill()
        process.wait(10)
    assert health("alive", environment)[0] == 1


def test_a_worker_is_well_while_it_answers_and_goes_on() -> None:
    fault = ""
    collector = WorkerCollector({"m": PassStats()}, dict)
    with exporting("127.0.0.1:0", collector, lambda: fault) as address:
        environment = os.environ | {"RELTRACE_WORKER_METRICS": address}
        assert health("worker", environment) == (0, "")
        # A proxy for the web is none of its business.
        assert health("worker", environment | {"http_proxy": "http://127.0.0.1:9"}) == (0, "")
        fault = "the engine thread has stood still for 61 s"
        code, message = health("worker", environment)
        assert (code, "503" in message) == (1, True)
    assert health("worker", environment)[0] == 1


def test_checks_that_there_are_not() -> None:
    assert health("sideways", dict(os.environ))[0] == 2


def test_scripts_are_posix_shell() -> None:
    for script in (DEPLOY / "secrets.sh", REDIS / "start.sh"):
        done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        if shutil.which("dash"):
            assert subprocess.run(["dash", "-n", script], timeout=60).returncode == 0
