"""What Prometheus reads of a worker."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from reference.loaded import Checkpoints, prepare
from reltrace_proto.net import SettingError
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.models.placement import device_memory
from reltrace_worker.observability.metrics import (
    PassStats,
    WorkerCollector,
    exporting,
)
from reltrace_worker.session.runner import Runner
from reltrace_worker.types.jobs import TraceRequest

README = Path(__file__).parents[3] / "worker" / "README.md"


def read(address: str) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, "".join(v for k, v in sample.labels.items() if k != "model")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_passes_are_counted(checkpoints: Checkpoints) -> None:
    """
    Given a pass over jobs of two tenants, 10 tokens and 6, with room for 64
    I expect jobs, tokens, room, time in every phase, and the time shared out as 10 to 6.
    """
    loaded = checkpoints.loaded("plain")
    engine = Engine(loaded)
    runner = Runner(loaded, engine, max_tokens=64)
    ids = (list(range(20, 30)), list(range(20, 26)))
    leases = [
        worker_pb2.Lease(
            job_id=f"s-{number}",
            attempt=1,
            tenant=f"tenant {number}",
            spec=types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=own)),
        )
        for number, own in enumerate(ids)
    ]
    collector = WorkerCollector({loaded.name: runner.stats}, lambda: device_memory([loaded.device]))
    with exporting("127.0.0.1:0", collector) as address:
        assert read(address)["reltrace_worker_passes_total", ""] == 0
        assert await runner.add(leases) == []
        assert len(await runner.next_results()) == 2
        found = read(address)
    assert found["reltrace_worker_passes_total", ""] == 1
    assert found["reltrace_worker_jobs_total", "succeeded"] == 2
    assert found["reltrace_worker_jobs_total", "failed"] == 0
    assert found["reltrace_worker_tokens_total", ""] == 16
    assert found["reltrace_worker_capacity_tokens_total", ""] == 64
    for phase in ("forward", "backward", "transfer"):
        assert 0 < found["reltrace_worker_seconds_total", phase] < 60
    first, second = (
        found["reltrace_worker_tenant_seconds_total", f"tenant {number}"] for number in range(2)
    )
    assert first == pytest.approx(second * 10 / 6)
    # The whole of the pass, with what belongs to no phase.
    phases = sum(v for (name, _), v in found.items() if name == "reltrace_worker_seconds_total")
    assert phases <= first + second < 60
    assert found["process_resident_memory_bytes", ""] > 1e7


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_time_is_told_by_phase(checkpoints: Checkpoints, checkpointing: str) -> None:
    loaded = checkpoints.loaded("plain")
    engine = Engine(loaded, checkpointing)  # type: ignore[arg-type]
    engine.run(prepare(loaded, TraceRequest("I have 5 cats")))
    before = dict(engine.seconds)
    assert all(seconds > 0 for seconds in before.values())
    engine.run(prepare(loaded, TraceRequest("I have 5 cats")))
    assert all(engine.seconds[phase] > before[phase] for phase in before)


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:x", ":1"])
def test_an_address_that_is_none(listen: str) -> None:
    collector = WorkerCollector({"m": PassStats()}, dict)
    with (
        pytest.raises(SettingError, match=r"--metrics .*: must be HOST:PORT"),
        exporting(listen, collector),
    ):
        pass


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(SettingError, match=r"Address already in use"),
            exporting(listen, WorkerCollector({"m": PassStats()}, dict)),
        ):
            pass


def test_health_says_what_stands_still() -> None:
    """For probes: 200 while all goes on, else 503 with the reason; metrics come all the same."""
    fault, silent = "", 0.0
    collector = WorkerCollector({"m": PassStats()}, dict, lambda: silent)

    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with exporting("127.0.0.1:0", collector, lambda: fault) as address:
        assert ask() == (200, "ok\n")
        fault, silent = "the engine thread has stood still for 61 s", 61.0
        assert ask() == (503, f"{fault}\n")
        assert read(address)["reltrace_worker_silent_seconds", ""] == 61.0


def test_every_metric_is_documented_and_the_other_way_round() -> None:
    registry = CollectorRegistry()
    registry.register(WorkerCollector({"m": PassStats()}, dict))
    exported = {metric.name for metric in registry.collect()}
    rows = r"^\| `(reltrace_worker_\w+?)(?:_total)?` "
    assert exported == set(re.findall(rows, README.read_text(), re.MULTILINE))
