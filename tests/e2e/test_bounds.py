"""Submissions that are larger than a bound of the queue."""

from collections.abc import Callable

import pytest
import reltrace


def test_many_prompts_pass_through_a_small_queue(start_demo: Callable[..., str]) -> None:
    """
    Given a tenant with a bound of 100 jobs, and 600 prompts
    I expect 600 traces: the client sends fewer at once.
    """
    with reltrace.Client(start_demo("--tenant-max-jobs", "100")) as client:
        results = list(client.trace_many([f"I have {n} cats" for n in range(600)], timeout=100))
        assert sorted(result.id for result in results) == list(range(600))
        assert not [result for result in results if isinstance(result, reltrace.Failure)]
        assert len(results) == 600
        client.admin.set_tenant("default", max_jobs=0)
        with pytest.raises(reltrace.PermissionDenied, match="of the tenant takes no jobs"):
            client.trace("I have 5 cats", timeout=30)
