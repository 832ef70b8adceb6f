"""The command as a process of its own."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import grpc
import psutil
import pytest
import redis
from certificates import make_certificates
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.keys import SCHEMA
from reltrace_scheduler.local.binary import find_server

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "reltrace_scheduler", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=10)[1]
    return line.split()[-1]


def refused(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in errors
    return errors


def test_it_serves_with_a_redis_of_its_own_and_ends_in_order(start: Start, tmp_path: Path) -> None:
    process = start("--listen", "127.0.0.1:0", "--data", str(tmp_path))
    with grpc.insecure_channel(address_of(process)) as channel:
        status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
            admin_pb2.GetStatusRequest(), timeout=10
        )
        assert status.redis_version
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "reltrace.v1.TraceService", "reltrace.v1.WorkerService"):
            states = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert any(s.status == health_pb2.HealthCheckResponse.SERVING for s in states)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([listing]), timeout=10
        )
        assert {service.name for service in answer.list_services_response.service} >= {
            "grpc.health.v1.Health",
            "reltrace.v1.AdminService",
            "reltrace.v1.TraceService",
            "reltrace.v1.WorkerService",
        }
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_it_serves_with_a_redis_named_by_url(start: Start, redis_url: str) -> None:
    process = start("--listen", "127.0.0.1:0", "--redis", redis_url)
    with grpc.insecure_channel(address_of(process)) as channel:
        grpc.channel_ready_future(channel).result(timeout=10)


def test_it_ends_when_its_keys_become_those_of_another_version(
    start: Start, redis_url: str
) -> None:
    """Whoever moves them to another schema relies on that: its scripts would destroy them."""
    process = start("--listen", "127.0.0.1:0", "--redis", redis_url)
    address_of(process)
    with redis.Redis.from_url(redis_url) as store:
        try:
            store.set(SCHEMA, 999)
            errors = refused(process)
        finally:
            store.delete(SCHEMA)
    assert "reltrace-scheduler: the keys in this Redis are of schema 999, and reltrace" in errors


def test_a_redis_that_can_not_be_reached(start: Start) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    errors = refused(start("--listen", "127.0.0.1:0", "--redis", f"redis://127.0.0.1:{port}"))
    assert "can not be reached" in errors


def test_a_port_that_is_taken(start: Start, redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refused(start("--listen", address, "--redis", redis_url))


def test_where_the_queue_is_must_be_said_once(start: Start, redis_url: str, tmp_path: Path) -> None:
    for options in ((), ("--redis", redis_url, "--data", str(tmp_path))):
        process = start(*options)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert "--redis" in errors
        assert "--data" in errors


def test_other_machines_need_tls_and_tokens(start: Start, redis_url: str) -> None:
    errors = refused(start("--listen", "0.0.0.0:0", "--redis", redis_url))
    assert "add --tls-cert and --tls-key and --tokens" in errors
    assert "--insecure" in errors
    assert address_of(start("--listen", "0.0.0.0:0", "--redis", redis_url, "--insecure"))


def test_metrics_are_not_shown_to_the_network_unasked(start: Start, redis_url: str) -> None:
    process = start("--redis", redis_url, "--metrics", "0.0.0.0:0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "or say --insecure-metrics" in errors


def test_output_folders_of_all_tenants_are_told(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    """
    Given tokens, which have tenants, and a folder of each tenant beside one of all
    I expect a line that names the latter; and a folder that fsspec would read as two is refused.
    """
    file = tmp_path / "tokens.toml"
    start("token", "--name", "a", "--role", "client", "--file", str(file)).communicate(timeout=30)
    options = ("--redis", redis_url, "--listen", "127.0.0.1:0", "--tokens", str(file))
    own, shared = "file:///srv/{tenant}", "file:///srv/shared"
    process = start(*options, "--output-uri", own, "--output-uri", shared)
    assert address_of(process)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    (line,) = [line for line in errors.splitlines() if "output_uri.shared" in line]
    assert shared in line
    assert own not in line
    chained = "file:///srv/a::file:///srv/b"
    errors = refused(start(*options, "--output-uri", chained))
    assert f"--output-uri {chained}: must be one plain URL" in errors


def test_it_serves_tls_to_those_who_have_a_token(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    file = tmp_path / "tokens.toml"
    made = start("token", "--name", "root", "--role", "operator", "--file", str(file))
    output, said = made.communicate(timeout=30)
    assert made.returncode == 0
    token = output.strip()
    assert token not in said
    assert token not in file.read_text()

    process = start(
        "--listen", "127.0.0.1:0", "--redis", redis_url, "--tokens", str(file),
        "--tls-cert", str(certificates.server_cert), "--tls-key", str(certificates.server_key),
        "--tls-client-ca", str(certificates.ca),
    )  # fmt: skip
    mine = grpc.ssl_channel_credentials(
        certificates.ca.read_bytes(),
        certificates.client_key.read_bytes(),
        certificates.client_cert.read_bytes(),
    )
    with grpc.secure_channel(address_of(process), mine) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        status = admin.GetStatus(
            admin_pb2.GetStatusRequest(),
            metadata=(("authorization", f"Bearer {token}"),),
            timeout=10,
        )
        assert status.redis_version
        with pytest.raises(grpc.RpcError, match="asks for a token"):
            admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=10)


def test_a_token_without_a_file_is_printed_with_its_entry(start: Start, tmp_path: Path) -> None:
    made = start(
        "token", "--name", "a", "--role", "client", "--tenant", "team-a", "--expires", "30d"
    )
    output, entry = made.communicate(timeout=30)
    assert made.returncode == 0
    assert output.startswith("rlt_")
    assert output.count("\n") == 1
    file = tmp_path / "tokens.toml"
    file.write_text(entry)
    assert Tokens(file).find(output.strip()).tenant == "team-a"
    assert "\nexpires = 20" in entry


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--name", "a b", "--role", "client"), "name 'a b': must be 1 to 64"),
        (("--name", "a", "--role", "client", "--tenant", "x:y"), "tenant 'x:y': must be"),
        (("--name", "a", "--role", "worker", "--tenant", "x"), "works for every tenant"),
        (("--name", "a", "--role", "client", "--expires", "x"), "--expires x: must be days or"),
        (("--name", "a", "--role", "client", "--file", "/no/such/folder/f"), "No such file"),
    ],
)
def test_a_token_that_can_not_be_made(start: Start, options: tuple[str, ...], said: str) -> None:
    made = start("token", *options)
    output, errors = made.communicate(timeout=30)
    assert (made.returncode, output) == (1, "")
    assert said in errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tls-cert", "c.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-client-ca", "c.pem"), "--tls-client-ca needs"),
    ],
)
def test_halves_of_options(
    start: Start, redis_url: str, options: tuple[str, ...], said: str
) -> None:
    process = start("--redis", redis_url, *options)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert said in " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--results-url", "/srv/results"), 1, "--results-url /srv/results: must be a URL"),
        (("--output-uri", "nothing://x"), 1, "--output-uri nothing://x: "),
        (("--shards", "0"), 2, "'RELTRACE_SHARDS'): Input should be greater than or equal to 1"),
        (("--log-format", "xml"), 2, "'xml' is not one of 'console', 'json'"),
        (("--traces-share", "2"), 2, "Input should be less than or equal to 1"),
        (("--traces", "collector:4317"), 1, "--traces collector:4317: must be a URL"),
        (("--web", "nowhere"), 1, "--web nowhere: "),
    ],
)
def test_values_that_can_not_be(
    start: Start, redis_url: str, options: tuple[str, ...], code: int, said: str
) -> None:
    process = start("--redis", redis_url, "--listen", "127.0.0.1:0", *options)
    _, errors = process.communicate(timeout=30)
    assert said in " ".join(errors.replace("│", " ").split())
    assert process.returncode == code


def test_options_of_a_file(
    start: Start, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a file with an address, a URL of Redis and output folders
    I expect them to be in force, and what stands on the command line to win.
    """
    file = tmp_path / "scheduler.toml"
    file.write_text(
        f'listen = "127.0.0.1:x"\nredis = "{redis_url}"\noutput-uri = ["nothing://x"]\n'
    )
    options = ("--config", str(file), "--listen", "127.0.0.1:0")
    assert "--output-uri nothing://x" in refused(start(*options))
    assert address_of(start(*options, "--output-uri", "file:///srv"))
    # The environment wins over the file, too.
    monkeypatch.setenv("RELTRACE_OUTPUT_URI", "file:///srv file:///home")
    monkeypatch.setenv("RELTRACE_SCHEDULER_CONFIG", str(file))
    assert address_of(start("--listen", "127.0.0.1:0"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lese = 3", "there is no option 'lese'"),
        ("lease = 0.1", "Input should be greater than or equal to 0.5"),
        ("lease =", "Invalid value"),
    ],
)
def test_a_file_of_options_that_is_wrong(
    start: Start, redis_url: str, tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "scheduler.toml"
    file.write_text(content)
    process = start("--redis", redis_url, "--config", str(file))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert said in " ".join(errors.replace("│", " ").split())


def test_a_tokens_file_that_is_broken(start: Start, redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text("[[token")
    assert "is not TOML" in refused(start("--redis", redis_url, "--tokens", str(file)))


PASSWORD = "geheim/mit:allem@?#"


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[int]:
    """A Redis on a port of this machine that asks for a password."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = tmp_path / "redis.conf"
    config.write_text(
        f'port {port}\nbind 127.0.0.1\nsave ""\nappendonly yes\nrequirepass "{PASSWORD}"\n'
    )
    server = subprocess.Popen(
        [find_server(), str(config)], stdout=subprocess.PIPE, cwd=tmp_path, text=True
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "eady to accept connections" in line:
            break
    yield port
    server.kill()
    server.communicate(timeout=10)


def test_a_redis_with_a_password(
    start: Start, locked_redis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://127.0.0.1:{locked_redis}"
    quoted = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{locked_redis}"
    password_file, url_file = tmp_path / "password", tmp_path / "url"
    password_file.write_text(PASSWORD + "\n")
    url_file.write_text(quoted + "\n")
    listen = ("--listen", "127.0.0.1:0")
    for options, variables in (
        (("--redis", url, "--redis-password-file", str(password_file)), {}),
        (("--redis", url), {"RELTRACE_REDIS_PASSWORD": PASSWORD}),
        (("--redis-url-file", str(url_file)), {}),
        ((), {"RELTRACE_REDIS": quoted}),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            process = start(*listen, *options, "--log-level", "debug")
            assert address_of(process)
            assert PASSWORD not in " ".join(psutil.Process(process.pid).cmdline())
            process.send_signal(signal.SIGTERM)
            output = "".join(process.communicate(timeout=20))
            assert "geheim" not in output

    errors = refused(start(*listen, "--redis", url))
    assert "RELTRACE_REDIS_PASSWORD" in errors
    password_file.write_text("geheim, but wrong")
    errors = refused(start(*listen, "--redis", url, "--redis-password-file", str(password_file)))
    assert "geheim" not in errors


@pytest.mark.parametrize(
    "url",
    [
        "redis://:geheim@127.0.0.1:1",
        "redis://user:geheim@127.0.0.1:1",
        "redis://geheim@127.0.0.1:1",
        "rediss://:gehe/geheim@127.0.0.1:1",
        "redis://:ge?geheim@127.0.0.1:1",
        "redis://:g://geheim@127.0.0.1:1",
        "redis://127.0.0.1:1?password=geheim",
        "redis://[:geheim@127.0.0.1:1",
    ],
)
def test_a_password_in_sight_is_refused_and_not_repeated(
    start: Start, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = refused(start("--redis", url))
    assert "RELTRACE_REDIS_PASSWORD" in errors
    assert "geheim" not in errors
    # Where it is allowed, it is not repeated either.
    monkeypatch.setenv("RELTRACE_REDIS", url)
    assert "geheim" not in refused(start())


def test_files_about_redis_that_can_not_be_used(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    empty, two = tmp_path / "empty", tmp_path / "two"
    empty.write_text("\n")
    two.write_text("a\nb\n")
    url = ("--redis", redis_url)
    for options, said in (
        ((*url, "--redis-url-file", str(two)), "exclude each other"),
        (("--redis-url-file", str(tmp_path / "missing")), "No such file"),
        (("--redis-url-file", str(two)), "must hold one line"),
        ((*url, "--redis-password-file", str(empty)), "must hold one line"),
        ((*url, "--redis-ca", str(empty)), "only a rediss:// URL uses it"),
        (("--redis", "rediss://h", "--redis-ca", str(tmp_path / "missing")), "no such file"),
    ):
        assert said in refused(start(*options))
