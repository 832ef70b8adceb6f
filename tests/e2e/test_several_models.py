"""One worker with two models, revisions, tensors in a store, and its end by an operator's word."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reltrace
from e2e.conftest import Process, wait_until
from safetensors.numpy import load_file

Start = Callable[..., Process]

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"


@dataclass
class Service:
    client: reltrace.Client
    worker: Process
    results: Path
    output: Path


@pytest.fixture
def service(start: Start, tmp_path: Path, checkpoints: dict[str, Path]) -> Iterator[Service]:
    results, output = tmp_path / "results", tmp_path / "output"
    scheduler = start(
        "reltrace_scheduler", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0",
        "--results-url", results.as_uri(), "--results-above", "20000",
        "--output-uri", output.as_uri(), "--shards", "3",
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    worker = start(
        "reltrace_worker", "--scheduler", address, "--threads", "1", "--max-tokens", "512",
        "--model", "demo", "--model", str(checkpoints["tied"]),
    )  # fmt: skip
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 2, "both models are served", 100)
        yield Service(client, worker, results, output)


def test_models_take_turns_and_large_tensors_go_to_a_store(service: Service) -> None:
    """
    Given a queue of three shards and one worker with two models
    I expect jobs of both to run, by name and by revision, large tensors to come through the store
    bit for bit, shards of a batch to be written where it asks, and the worker to leave when told.
    """
    client = service.client
    demo, tied = sorted(client.models(), key=lambda model: model.name != "reltrace-demo")
    (worker,) = client.status().workers
    assert {worker.model, *worker.further_models} == {demo.name, tied.name}

    # By name, and by revision.
    pinned = f"{demo.name}@{demo.revision}"
    by_name = client.trace(PROMPT, model=demo.name)
    by_revision = client.trace(PROMPT, model=pinned)
    assert by_revision.provenance.revision == demo.revision
    np.testing.assert_array_equal(by_name.relevance, by_revision.relevance)
    with pytest.raises(reltrace.ModelNotFound, match=f"served: {demo.name}@{demo.revision}"):
        client.trace(PROMPT, model=f"{demo.name}@another")
    with pytest.raises(reltrace.ModelNotFound, match="several models are served"):
        client.trace(PROMPT)

    # Both at once, over all shards.
    items = [
        {"prompt": f"I have {number} cats", "model": model.name, "id": f"{model.name} {number}"}
        for number in range(60)
        for model in (demo, tied)
    ]
    traces = {trace.id: trace for trace in client.trace_many(items, timeout=100)}
    assert all(isinstance(trace, reltrace.Trace) for trace in traces.values()), traces
    assert {t.provenance.model for t in traces.values()} == {demo.name, tied.name}
    assert len(traces) == len(items)

    # Small enough to be sent, and too large.
    few = client.trace(PROMPT, model=demo.name, reduce="full", layers=[1], sites="head")
    assert few["head"].nbytes < 20000
    full = client.trace(PROMPT, model=demo.name, reduce="full", sites=("resid", "neuron"))
    assert full["neuron"].nbytes > 20000
    direct = client.trace(PROMPT, model=demo.name, sites=("resid", "neuron"))
    for site in full.sites:
        np.testing.assert_allclose(full.by_token(site), direct[site], rtol=1e-4, atol=1e-6)
    (stored,) = service.results.rglob("*.safetensors")
    assert stored.name.startswith(full.job_id)

    # A batch's tensors never come this way.
    (refused,) = client.trace_many(
        [{"prompt": PROMPT, "model": demo.name}], output_uri="file:///etc"
    )
    assert isinstance(refused, reltrace.Failure)
    assert "is in no folder allowed here: " + service.output.as_uri() in str(refused.error)
    batch = list(
        client.trace_many(
            [{"prompt": f"I have {number} cats", "model": demo.name} for number in range(40)],
            output_uri=f"{service.output.as_uri()}/run-1",
            reduce="full",
            timeout=100,
        )
    )
    assert len(batch) == 40
    shards = list((service.output / "run-1").glob("shard-*.safetensors"))
    assert 0 < len(shards) < 40
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(f"{trace.job_id}/0/resid" for trace in batch)
    for trace in batch:
        assert trace.relevance.shape[1] == len(trace.tokens)
        np.testing.assert_allclose(
            trace.by_token(), traces[f"{demo.name} {trace.id}"].relevance, rtol=1e-4, atol=1e-5
        )

    with pytest.raises(reltrace.NotFound, match="no worker 'nobody' is connected"):
        client.admin.drain("nobody")
    client.admin.drain(worker.id)
    assert service.worker.popen.wait(60) == 0
    assert client.status().workers == ()
