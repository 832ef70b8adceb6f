"""Large results: the same bits by way of a store, and none of them by way of Redis."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import reltrace
from e2e.conftest import Process, wait_until
from reltrace_scheduler.local.redis import EmbeddedRedis

Start = Callable[..., Process]

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
PROMPTS = [f"I have {number} cats and 3 dogs. My cats love to play with my" for number in range(16)]
ABOVE = 20_000


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = EmbeddedRedis(tmp_path / "redis")
    yield asyncio.run(server.start())
    asyncio.run(server.stop())


def written(url: str) -> int:
    """Bytes that Redis was sent so far."""
    with redis.Redis.from_url(url) as store:
        return int(store.info("stats")["total_net_input_bytes"])


def files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.safetensors"))


def many(client: reltrace.Client, **given: str) -> int:
    """Trace all prompts in full; return the bytes of their tensors."""
    traces = list(client.trace_many(PROMPTS, reduce="full", sites=("resid", "neuron"), **given))
    assert all(isinstance(trace, reltrace.Trace) for trace in traces), traces
    return sum(trace[site].nbytes for trace in traces for site in trace.sites)


def alone(client: reltrace.Client) -> list[reltrace.Trace]:
    """Trace one prompt at a time, in several ways that give large results."""
    found = [
        client.trace(PROMPT, sites=("neuron", "embed", "head"), reduce="full"),
        client.trace(PROMPT, sites="neuron", reduce="full", dtype="bfloat16"),
        client.trace(PROMPT, sites="resid", reduce="topk", top_k=2000),
    ]
    return found + client.trace(PROMPT, reduce="full", target=[reltrace.Target(" dogs"), "max"])


def test_a_store_changes_no_bit_and_spares_redis(
    redis_url: str, start: Start, tmp_path: Path
) -> None:
    """
    Given a scheduler whose large results go to a folder, and after it one without
    I expect the same bits from both; and of what comes through the folder, or is written to a
    batch's own, next to nothing in Redis, by way of which all went otherwise.
    """
    results, output = tmp_path / "results", tmp_path / "output"
    common = ("--redis", redis_url, "--listen")
    scheduler = start(
        "reltrace_scheduler", *common, "127.0.0.1:0", "--results-url", results.as_uri(),
        "--results-above", str(ABOVE), "--output-uri", output.as_uri(),
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    worker = start(
        "reltrace_worker", "--scheduler", address, "--model", "demo",
        "--threads", "1", "--max-tokens", "512", "--worker-id", "gpu-1", "--log-format", "json",
    )  # fmt: skip
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
        stored = alone(client)
        # The two targets share a file.
        assert files(results) == len(stored) - 1
        before = written(redis_url)
        size = many(client)
        by_store = written(redis_url) - before
        before += by_store
        assert many(client, output_uri=output.as_uri()) == size
        by_output = written(redis_url) - before
        assert files(output) > 0

        assert scheduler.stop() == 0
        start("reltrace_scheduler", *common, address).first_line()
        kept = files(results)
        sent = alone(client)
        before = written(redis_url)
        assert many(client) == size
        assert written(redis_url) - before > size
        assert files(results) == kept
    # Before its scheduler, which it would wait for.
    assert worker.stop() == 0
    said = [json.loads(line) for line in worker.errors.read_text().splitlines()]
    assert {line["worker"].rpartition("-")[0] for line in said} == {"gpu-1"}
    assert {"model.loaded", "scheduler.away", "worker.drains"} <= {line["event"] for line in said}
    assert size > 1_000_000
    assert max(by_store, by_output) < size / 10
    for one, other in zip(stored, sent, strict=True):
        assert one.target == other.target
        for site in other.sites:
            parts = other.parts(site)
            assert one.parts(site).keys() == parts.keys()
            for part, array in parts.items():
                assert one.parts(site)[part].dtype == array.dtype
                assert one.parts(site)[part].tobytes() == array.tobytes()
