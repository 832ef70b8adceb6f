"""The command as a process of its own."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc

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
