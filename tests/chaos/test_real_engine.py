"""The real worker, with a model, while workers and schedulers are killed."""

from collections.abc import Callable

import numpy as np
import pytest
import reltrace
from chaos.cluster import Cluster
from chaos.killer import Killer
from waiting import wait_until

Start = Callable[..., Cluster]

PACKING = 1e-5
"""Of each layer's largest |R|: what one pack may differ from another in float32."""

PROMPTS = [
    f"I have {number} cats and {number % 7} dogs. My cats love to play with my"
    for number in range(240)
]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_traces_are_those_of_an_undisturbed_run(start: Start) -> None:
    """
    Given two workers with the demo model, and the traces of an undisturbed run
    If workers and schedulers are killed while the same prompts are traced again
    I expect every prompt's trace once, equal within what another packing may change.
    """
    cluster = start(workers=0, lease=2.0)
    workers = [
        cluster.start_module(
            name, "reltrace_worker", "--scheduler", cluster.address, "--model", "demo",
            "--threads", "1", "--max-tokens", "512", "--worker-id", name,
        )
        for name in ("real0", "real1")
    ]  # fmt: skip
    wait_until(lambda: cluster.connected() == 2, "the workers connect", 100)
    with reltrace.Client(cluster.address, retry_timeout=60) as client:
        undisturbed = list(client.trace_many(PROMPTS, ordered=True, timeout=100))
        taken: list[reltrace.Trace] = []
        killer = Killer(
            lambda: {"worker": workers, "scheduler": cluster.schedulers},
            {"worker": 0.5, "scheduler": 0.5},
            lambda: len(taken),
            seed=6,
        )
        stream = client.trace_many(PROMPTS, timeout=200)
        for trace in stream:
            assert isinstance(trace, reltrace.Trace), trace
            taken.append(trace)
            if len(taken) % 50 == 10:
                killer.kill()
    assert killer.kills["worker"] >= 1
    assert killer.kills["scheduler"] >= 1
    assert sorted(trace.id for trace in taken) == list(range(len(PROMPTS)))
    for trace in taken:
        assert isinstance(trace.id, int)
        before = undisturbed[trace.id]
        assert isinstance(before, reltrace.Trace)
        assert trace.tokens == before.tokens
        assert trace.target.token_id == before.target.token_id
        largest = np.abs(before.relevance).max(axis=1, keepdims=True)
        assert (np.abs(trace.relevance - before.relevance) <= PACKING * largest).all()
