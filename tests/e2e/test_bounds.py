"""Submissions that are larger than a bound of the queue."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reltrace
from e2e.conftest import Process, wait_until


@pytest.fixture
def small(tmp_path: Path, start: Callable[..., Process]) -> str:
    """The address of a service whose tenants may have 100 jobs."""
    scheduler = start(
        "reltrace_scheduler",
        "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0", "--tenant-max-jobs", "100",
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    start("reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1")
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
    return address


def test_many_prompts_pass_through_a_small_queue(small: str) -> None:
    """
    Given a tenant with a bound of 100 jobs, and 600 prompts
    I expect 600 traces: the client sends fewer at once.
    """
    with reltrace.Client(small) as client:
        results = list(client.trace_many([f"I have {n} cats" for n in range(600)], timeout=100))
        assert sorted(result.id for result in results) == list(range(600))
        assert not [result for result in results if isinstance(result, reltrace.Failure)]
        assert len(results) == 600
        client.admin.set_tenant("default", max_jobs=0)
        with pytest.raises(reltrace.PermissionDenied, match="of the tenant takes no jobs"):
            client.trace("I have 5 cats", timeout=30)
