"""Proxies that the environment names."""

from __future__ import annotations

import pytest
import reltrace
from fake_server import FakeServer
from proxy import proxy_to

# A name that only the proxy knows.
REMOTE = "scheduler.test:50051"


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_another_machine_is_reached_by_the_proxy(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with proxy_to(server.address) as (proxy, asked):
        monkeypatch.setenv(variable, proxy)
        with reltrace.Client(REMOTE) as client:
            assert client.trace("a", timeout=20).tokens == ["<s>", "a"]
        assert set(asked) == {REMOTE}
        # This machine's own server is not behind it.
        asked.clear()
        with reltrace.Client(server.address) as client:
            client.trace("a", timeout=20)
        assert not asked
        # Nor are those that are excepted.
        monkeypatch.setenv("no_proxy", "other.test,.test")
        with (
            reltrace.Client(REMOTE, retry_timeout=0.5) as client,
            pytest.raises(reltrace.Unavailable, match=r"scheduler\.test"),
        ):
            client.models()
        assert not asked
