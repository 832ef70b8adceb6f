"""Who goes first where jobs wait."""

from __future__ import annotations

import pytest
import reltrace
from fake_server import FakeServer


def test_priority(server: FakeServer, client: reltrace.Client) -> None:
    client.trace("x")
    client.trace("x", priority="batch")
    list(client.trace_many(["x"], priority="batch"))
    assert [request.priority for request in server.requests] == [1, 2, 2]


@pytest.mark.parametrize("wrong", ["urgent", None, 1, ["batch"]])
def test_a_priority_that_is_none(client: reltrace.Client, wrong: object) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="priority: must be one of interactive, ba"):
        client.trace("x", priority=wrong)  # type: ignore[call-overload]
    with pytest.raises(reltrace.InvalidArgument, match="priority: must be one of"):
        client.trace_many(["x"], priority=wrong)  # type: ignore[call-overload]
