"""Large results and batches in an object store: real HTTP to a server that speaks S3."""

from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import reltrace
from e2e.conftest import Process, wait_until
from e2e.printed import commands, shell
from moto.server import ThreadedMotoServer

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; every process finds its server by the usual variables."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "bucket"
    server.stop()


def keys(bucket: str) -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket=bucket)
    return [entry["Key"] for entry in found.get("Contents", [])]


def test_tensors_go_through_an_object_store(
    start: Callable[..., Process], tmp_path: Path, bucket: str
) -> None:
    """
    Given a scheduler whose large results go to a bucket, and which allows a folder of it
    I expect a large trace to come through the bucket, and a batch's tensors to be where it asked.
    """
    scheduler = start(
        "reltrace_scheduler", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0",
        "--results-url", f"s3://{bucket}/results", "--results-above", "20000",
        "--output-uri", f"s3://{bucket}/output", "--output-uri", f"s3://{bucket}/run-1",
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    start(
        "reltrace_worker", "--scheduler", address, "--model", "demo",
        "--threads", "1", "--max-tokens", "512",
    )  # fmt: skip
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
        small = client.trace(PROMPT, sites="neuron", layers=[1], reduce="full", dtype="bfloat16")
        large = client.trace(PROMPT, sites="neuron", reduce="full")
        assert small["neuron"].nbytes < 20000 < large["neuron"].nbytes
        # Read before the result is acknowledged, or not: the sweeper leaves what is young.
        (key,) = keys(bucket)
        assert key.startswith("results/")
        assert str(large.job_id) in key
        summed = client.trace(PROMPT, sites="neuron")
        np.testing.assert_allclose(large.by_token("neuron"), summed["neuron"], rtol=1e-4, atol=1e-6)

        prompts = [f"I have {number} cats" for number in range(12)]
        batch = list(
            client.trace_many(prompts, reduce="full", output_uri=f"s3://{bucket}/output/run")
        )
        direct = {trace.id: trace for trace in client.trace_many(prompts)}
        for trace in batch:
            assert isinstance(trace, reltrace.Trace)
            np.testing.assert_allclose(
                trace.by_token(), direct[trace.id].relevance, rtol=1e-4, atol=1e-6
            )
        assert [key for key in keys(bucket) if key.startswith("output/run/shard-")]
        # The same by the command, as its page prints it; its folder holds where they are.
        (tmp_path / "prompts.jsonl").write_text("".join(f'"{one}"\n' for one in prompts))
        (command,) = [one for one in commands("client/BATCH.md") if "--output-uri" in one]
        shell(f"{command} --server {address}", tmp_path)
        loaded = reltrace.load_batch(tmp_path / "traces")
        assert len(loaded) == len(prompts)
        for trace in loaded:
            assert trace.relevance.ndim == 3
            np.testing.assert_allclose(
                trace.by_token(), direct[trace.id].relevance, rtol=1e-4, atol=1e-6
            )
        assert [key for key in keys(bucket) if key.startswith("run-1/shard-")]
        written = sum(path.stat().st_size for path in (tmp_path / "traces").iterdir())
        assert written < loaded[0].relevance.nbytes * 12

        (refused,) = client.trace_many([PROMPT], output_uri="s3://other/place")
        assert isinstance(refused, reltrace.Failure)
        assert "is in no folder allowed here" in str(refused.error)
