"""The servers of a client, each with its channel; a call goes to the next reachable one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from random import SystemRandom
from time import monotonic
from typing import Protocol, TypeVar

import grpc.aio
from google.protobuf.message import Message
from reltrace_proto.net import ChannelOptions, Credentials, Metadata
from reltrace_proto.v1 import admin_pb2_grpc, trace_pb2_grpc

from reltrace.transport import forking
from reltrace.types.errors import TraceError

_RECONNECT: ChannelOptions = (
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Seconds for which a server that failed is avoided, doubled with every further failure.
_FIRST_AVOIDANCE, _MAX_AVOIDANCE = 0.5, 15.0


Request = TypeVar("Request", bound=Message, contravariant=True)
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary call of a stub."""

    def __call__(
        self, request: Request, /, *, timeout: float, metadata: Metadata
    ) -> Awaitable[Response]: ...


class Server:
    """One address, its channel and its stubs."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.traces: trace_pb2_grpc.TraceServiceAsyncStub = trace_pb2_grpc.TraceServiceStub(channel)
        self.admin: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(channel)
        self.avoided_until = 0.0
        self._failures = 0

    def succeeded(self) -> None:
        self.avoided_until = 0.0
        self._failures = 0

    def failed(self) -> None:
        avoidance = min(_MAX_AVOIDANCE, _FIRST_AVOIDANCE * 2.0 ** min(self._failures, 10))
        self.avoided_until = monotonic() + avoidance
        self._failures += 1


class Servers:
    """Chooses servers in turn, beginning with a random one, so that clients spread over them."""

    def __init__(self, addresses: Sequence[str], credentials: Credentials) -> None:
        forking.check_fork()
        self._addresses = addresses
        self._credentials = credentials
        # Not the module's generator, which the caller may have seeded.
        self._next = SystemRandom().randrange(len(addresses))
        self._servers: list[Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        # Not the object itself: one that is forgotten without `close` leaves gRPC's threads.
        self._open = object()

    def choose(self) -> Server:
        """Return the server for the next call; opens the channels on the running event loop."""
        forking.check_fork()
        loop = asyncio.get_running_loop()
        if not self._servers:
            self._loop = loop
            self._servers = [
                Server(address, self._credentials.open_channel(address, _RECONNECT))
                for address in self._addresses
            ]
            forking.opened(self._open, (server.channel for server in self._servers))
        if loop is not self._loop:
            raise TraceError(
                "this client belongs to the event loop of its first call, and can not be used on "
                "another one: make a client for each loop; a synchronous Client has no such bound"
            )
        count = len(self._servers)
        now = monotonic()
        in_turn = [self._servers[(self._next + step) % count] for step in range(count)]
        # If all are avoided, the one that is avoided for the shortest time.
        chosen = next(
            (server for server in in_turn if server.avoided_until <= now),
            min(in_turn, key=lambda server: server.avoided_until),
        )
        self._next = (self._servers.index(chosen) + 1) % count
        return chosen

    async def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            await server.channel.close()
        forking.closed(self._open)
