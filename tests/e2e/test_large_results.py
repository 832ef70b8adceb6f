"""Large results: the same bits by way of a store, and none of them by way of Redis."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import reltrace
from e2e.conftest import Process, address_in, wait_until
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
        "--results-above", str(ABOVE), "--output-uri", f"{output.as_uri()}/{{tenant}}",
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
        assert many(client, output_uri=f"{output.as_uri()}/default") == size
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


def test_up_has_a_place_for_large_results(start: Start, tmp_path: Path) -> None:
    """
    Given `reltrace up`
    I expect results that are too large for its Redis in a folder of its data, which only this user
    can read, and the client to read them from there.
    """
    data = tmp_path / "my data"
    up = start(
        "reltrace", "up", "--port", "0", "--data", str(data),
        RELTRACE_MAX_RESULT_BYTES=str(1 << 17),
    )  # fmt: skip
    with reltrace.Client(address_in(up.first_line())) as client:
        small = client.trace(PROMPT)
        assert files(data / "results") == 0
        large = client.trace(PROMPT, reduce="full", sites=("resid", "neuron"))
        assert files(data / "results") == 1
    assert abs(large["resid"].sum(-1) - small.relevance).max() < 1e-3
    assert (data / "results").stat().st_mode & 0o077 == 0


def test_a_result_without_a_place_is_refused(start_demo: Callable[..., str]) -> None:
    """
    Given a scheduler without a store of large results
    If the result of one prompt of several would be larger than what goes through its Redis
    I expect that one to fail, with its size, the bound and what to do, and the others to be traced:
    when it is submitted if its tokens are known then, else before its pass.
    """
    bound = 1 << 17
    address = start_demo("--max-result-bytes", str(bound))
    with reltrace.Client(address, retry_timeout=100) as client:
        small = client.trace(PROMPT)
        prompts = [PROMPT, "cats", PROMPT * 20]
        found = list(client.trace_many(prompts, reduce="full", ordered=True))
        assert [type(one) for one in found] == [reltrace.Trace, reltrace.Trace, reltrace.Failure]
        assert type(found[2].error) is reltrace.ResourceExhausted
        with pytest.raises(reltrace.InvalidArgument) as refused:
            client.trace(input_ids=small.token_ids * 20, reduce="full", sites="neuron")
    assert refused.value.violations[0].field == "reduce"
    for message in (str(found[2].error), str(refused.value)):
        for said in (" bytes (", str(bound), "reduce='topk'", "output_uri", "--results-url"):
            assert said in message, message
