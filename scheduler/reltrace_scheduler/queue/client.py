"""The clients of Redis: of one server, of the primary that Sentinels name, of a cluster."""

import re
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import urlsplit

import hiredis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import RedisAddress
from reltrace_scheduler.queue.trouble import READ_ONLY, trouble_of

_TIMEOUT = 5.0
_SENTINEL_TIMEOUT = 1.0
"""Seconds for a Sentinel, before another one is asked."""
_SENTINEL_PORT = 26379

_OPTIONS: dict[str, Any] = {
    "decode_responses": False,
    # RESP3 begins with a command that a Redis too old for us does not know: it would fail before
    # its version could be read.
    "protocol": 2,
    "socket_timeout": _TIMEOUT,
    "socket_connect_timeout": _TIMEOUT,
    "health_check_interval": 15,
    # A pool that is exhausted raises, and hundreds of workers may connect again at one moment.
    "max_connections": 4096,
}


_LONG = 1 << 15
"""Bytes of an argument that is worth a write of its own."""


class _Writes(AbstractConnection):
    """Packs commands in C, as redis-py's blocking client does: its asyncio client loops over them.

    Also tells of a connection that is closed already, which uvloop does by a bare RuntimeError.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        # A command such as "CONFIG GET" is two words; a long one goes as it is, without a copy.
        if (
            not isinstance(args[0], str)
            or " " in args[0]
            or any(len(arg) > _LONG for arg in args if isinstance(arg, bytes))
        ):
            return super().pack_command(*args)
        return [hiredis.pack_command(args)]

    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        try:
            await super()._send_packed_command(command)
        except RuntimeError as error:
            raise ConnectionResetError(f"the connection is closed: {error}") from error


class PrimaryRedis(Redis):
    """Leaves a server that has become a replica, so that the new primary is looked for.

    redis-py keeps its connections: they would lead to the old primary for as long as it runs.
    """

    async def parse_response(
        self, connection: Connection, command_name: str | bytes, **options: Any
    ) -> Any:
        try:
            return await super().parse_response(connection, command_name, **options)
        except ResponseError as error:
            if trouble_of(error) not in READ_ONLY:
                raise
            pool: ConnectionPool = self.connection_pool
            await pool.disconnect(inuse_connections=False)
            await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            # redis-py repeats the command over a new connection, whose host is resolved anew.
            raise RedisConnectionError(f"this Redis is a replica: {error}") from error


class _SentinelPool(SentinelConnectionPool):
    async def get_master_address(self) -> Any:
        try:
            return await super().get_master_address()  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:
            # Its text describes the objects that took part, with reasons in between.
            reasons = sorted(set(re.findall(r">\)>\)> - (.+?)(?=, <|$)", str(error))))
            why = f": {', '.join(reasons)}" if reasons else ""
            raise MasterNotFoundError(
                f"no Sentinel names a primary {self.service_name!r} that is up{why}"
            ) from error

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def clients(address: RedisAddress) -> list[Redis]:
    """Return a client for every host of an address, any of which may answer.

    Raises
    ------
    StartError
        The URL is malformed.
    """
    try:
        if address.is_sentinel:
            found = [_through_sentinels(address)]
        else:
            found = [_single(url, address) for url in address.single]
    except ValueError:
        # The text of the ValueError may quote a part of the password.
        raise StartError(
            f"--redis {address.shown}: must be redis://HOST:PORT, rediss://HOST:PORT, unix:///PATH "
            "or redis+sentinel://HOST:PORT,HOST:PORT/NAME; in a password, write / as %2F, ? as "
            "%3F, # as %23, % as %25 and @ as %40"
        ) from None
    for client in found:
        pool: ConnectionPool = client.connection_pool
        pool.connection_class = _told(pool.connection_class)
    return found


def cluster(address: RedisAddress) -> Redis:
    """Return a client of a cluster, all of whose named nodes it may begin with."""
    # While a replica takes over, no node serves its slots for some seconds.
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.1), 5)
    first, *others = address.single
    nodes = [ClusterNode(*_host(urlsplit(url).netloc.rpartition("@")[2], 6379)) for url in others]
    options = _options(address)
    client: Any = RedisCluster.from_url(first, retry=retry, startup_nodes=nodes, **options)
    kind = _told(client.connection_kwargs["connection_class"])
    client.connection_kwargs["connection_class"] = kind
    for node in client.nodes_manager.startup_nodes.values():
        node.connection_class = kind
    # It has the commands that the queue uses, and no base in common with Redis that says so.
    return cast("Redis", client)


def _told(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(kind.__name__, (_Writes, kind), {})


def _options(address: RedisAddress) -> dict[str, Any]:
    options = dict(_OPTIONS)
    if address.ca is not None:
        options["ssl_ca_certs"] = str(address.ca)
    if address.password is not None:
        options["password"] = address.password
    return options


def _retry() -> Retry:
    # One quick retry; how long to wait beyond that is the caller's decision.
    return Retry(ExponentialBackoff(cap=0.2, base=0.05), 1)


def _single(url: str, address: RedisAddress) -> Redis:
    client = PrimaryRedis.from_url(url, retry=_retry(), **_options(address))
    if address.password is not None:
        # The argument gives way to a password in the URL.
        client.connection_pool.connection_kwargs["password"] = address.password
    return client


def _through_sentinels(address: RedisAddress) -> Redis:
    parts = [urlsplit(url) for url in address.single]
    name, _, database = parts[0].path.removeprefix("/").partition("/")
    if not name:
        raise ValueError
    hosts = [_host(part.netloc.rpartition("@")[2], _SENTINEL_PORT) for part in parts]
    # What stands in the URL beside the Sentinels is of the primary, and said as for one.
    scheme = parts[0].scheme.partition("+")[0]
    credentials = "".join(parts[0].netloc.rpartition("@")[:2])
    given: dict[str, Any] = dict(
        parse_url(f"{scheme}://{credentials}primary/{database}?{parts[0].query}")
    )
    del given["host"]
    own = {
        "username": given.pop("sentinel_username", None),
        "password": given.pop("sentinel_password", None),
        "socket_timeout": _SENTINEL_TIMEOUT,
        "socket_connect_timeout": _SENTINEL_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    options = {**given, **_options(address), "retry": _retry()}
    if options.pop("connection_class", None) is not None:
        options["ssl"] = own["ssl"] = True
        own |= {key: value for key, value in options.items() if key.startswith("ssl_")}
    sentinel = Sentinel(hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    client = sentinel.master_for(
        name, redis_class=PrimaryRedis, connection_pool_class=_SentinelPool, **options
    )
    return cast("Redis", client)


def _host(text: str, port: int) -> tuple[str, int]:
    place = urlsplit(f"//{text}")
    if not place.hostname:
        raise ValueError
    return place.hostname, place.port or port
