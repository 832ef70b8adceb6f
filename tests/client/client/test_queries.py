"""Jobs by their ids."""

from __future__ import annotations

import pytest
import reltrace
from fake_server import FakeServer


def test_jobs_by_their_ids(stuck: FakeServer, client: reltrace.Client) -> None:
    trace = client.trace("quick")
    assert trace.job_id == "s0-0"
    results = client.trace_many(["quick", "slow", "slow"])
    assert next(results).job_id == "s1-0"
    states = [job.state for job in client.jobs("s1-1", "s7-0")]
    assert states == ["leased", None]
    assert client.cancel("s1-1", "s7-0") == 1
    assert client.cancel("s1") == 1
    assert [job.state for job in client.jobs("s1-1")] == ["cancelled"]
    with pytest.raises(reltrace.NotFound):
        client.cancel("s7")


@pytest.mark.parametrize("wrong", ["", "a b", 7, "s1-x", "s1-2-3"])
def test_ids_that_are_none(client: reltrace.Client, wrong: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"ids\[1\]: must be"):
        client.cancel("s1", wrong)
    with pytest.raises(reltrace.InvalidArgument, match=r"ids\[0\]: must be a job id"):
        client.jobs(wrong)
