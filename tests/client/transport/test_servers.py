"""Several servers: calls are spread over them, and go on when one dies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest
import reltrace
from calls.test_trace_many import check, prompts
from fake_server import FakeServer
from nameserver import nameserver
from reltrace.transport import servers as module
from reltrace.transport.servers import Servers
from reltrace_proto.net import Credentials

LONG = "a prompt whose result has ten tokens and many chunks"


@dataclass
class Pair:
    """Two servers over one store, as schedulers are over one Redis."""

    one: FakeServer = field(default_factory=FakeServer)
    two: FakeServer = field(default_factory=FakeServer)

    @property
    def address(self) -> str:
        return f"{self.one.address},{self.two.address}"

    @property
    def servers(self) -> tuple[FakeServer, FakeServer]:
        return self.one, self.two


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    pair.two.submissions = pair.one.submissions
    pair.two.acknowledged = pair.one.acknowledged
    with pair.one, pair.two:
        pair.two._lock = pair.one._lock
        pair.two.changed = pair.one.changed
        yield pair


def test_calls_are_spread(pair: Pair) -> None:
    with reltrace.Client(pair.address) as client:
        assert client.address == pair.address
        for prompt in prompts(20):
            check(client.trace(prompt), prompt)
    counts = [len(server.presented) for server in pair.servers]
    # Submission, stream and acknowledgement of each, by turns.
    assert sum(counts) == 60
    assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_server_that_dies_costs_nothing(pair: Pair, killed: int) -> None:
    dead, survivor = pair.servers[killed], pair.servers[1 - killed]
    for server in pair.servers:
        server.piece_bytes = 16
    with reltrace.Client(pair.address, retry_timeout=20) as client:
        stream = client.trace_many(prompts(600), ordered=True)
        first = next(stream)
        dead.stop()
        traces = [first, *stream]
        assert [trace.id for trace in traces] == list(range(600))
        for trace, prompt in zip(traces, prompts(600), strict=True):
            check(trace, prompt)
        # And what comes later does not ask the dead one first.
        survivor.wait_acknowledged()
        asked = len(survivor.presented)
        client.models()
        assert len(survivor.presented) == asked + 1


def test_a_result_goes_on_at_another_server_where_it_broke_off(pair: Pair) -> None:
    for server in pair.servers:
        server.piece_bytes = 16
        # Each breaks off once, in the middle of a result of many chunks.
        server.drop_at = {3}
    with reltrace.Client(pair.address) as client:
        check(client.trace(LONG), LONG)
    streams = [(request.after_entry, request.after_chunk) for request in pair.one.streams]
    streams += [(request.after_entry, request.after_chunk) for request in pair.two.streams]
    assert sorted(streams) == [(0, 0), (0, 2), (0, 4)]
    assert pair.one.streams
    assert pair.two.streams


def test_no_server_at_all_names_them_all(pair: Pair) -> None:
    pair.one.stop()
    pair.two.stop()
    with (
        reltrace.Client(pair.address, retry_timeout=0.5) as client,
        pytest.raises(reltrace.Unavailable, match=re.escape(pair.address)),
    ):
        client.models()


def test_every_address_behind_a_name_is_used() -> None:
    with FakeServer() as one:
        port = one.address.rpartition(":")[2]
        with (
            FakeServer(address=f"127.0.0.2:{port}") as two,
            nameserver(["127.0.0.1", "127.0.0.2"]) as dns,
            reltrace.Client(f"dns://{dns}/schedulers.test:{port}", retry_timeout=20) as client,
        ):
            # Connections are made one after the other; calls may come before the second.
            for _ in range(1000):
                client.models()
                if one.presented and two.presented:
                    break
            assert one.presented
            assert two.presented
            one.stop()
            for _ in range(5):
                assert client.models()


def test_a_name_is_looked_up_again_before_the_client_gives_up() -> None:
    """A server that is started anew elsewhere is found under its name."""

    class Moving(list[str]):
        """Another address from the second look on."""

        def __iter__(self) -> Iterator[str]:
            yield self.pop(0) if len(self) > 1 else self[0]

    with FakeServer(address="127.0.0.2:0") as server:
        port = server.address.rpartition(":")[2]
        with (
            nameserver(Moving(["127.0.0.3", "127.0.0.2"])) as dns,
            reltrace.Client(f"dns://{dns}/schedulers.test:{port}", retry_timeout=15) as client,
        ):
            assert client.models()


async def test_a_server_that_failed_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: now)

    class Unopened(Credentials):
        def open_channel(self, address: object, options: object = ()) -> grpc.aio.Channel:
            return grpc.insecure_channel("127.0.0.1:1")

    servers = Servers(("a", "b", "c"), Unopened())

    def asked(count: int) -> list[str]:
        return [servers.choose().address for _ in range(count)]

    first = asked(3)
    assert sorted(first) == ["a", "b", "c"]
    assert asked(3) == first
    for _ in range(2):
        failing = next(s for s in (servers.choose() for _ in range(3)) if s.address == "b")
        failing.failed()
        assert "b" not in asked(6)
        # 0.5 s, then twice that.
        now += 1.01
        assert "b" in asked(3)
    # All are away: the one that failed first is asked first.
    for host in ("c", "a", "b"):
        now += 0.01
        for server in [servers.choose() for _ in range(3)]:
            if server.address == host and server.avoided_until <= now:
                server.failed()
    assert asked(1) == ["c"]


@pytest.mark.parametrize("address", ["h", "a:1,,b:2", "http://h:1"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="address: must be"):
        reltrace.Client(address)
