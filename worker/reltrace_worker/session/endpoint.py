"""The schedulers that a worker may connect to."""

import random

import grpc
from reltrace_proto.net import ChannelOptions, Credentials, parse_addresses

_CHANNEL_OPTIONS: ChannelOptions = (
    # Where several schedulers share an address, a new channel may find another one of them.
    ("grpc.use_local_subchannel_pool", 1),
    # The session decides when to connect again.
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Endpoints:
    """Schedulers in the random order in which they are tried, so that workers spread over them."""

    def __init__(self, addresses: str, credentials: Credentials, seed: int | None = None) -> None:
        self._addresses = list(parse_addresses(addresses))
        self._credentials = credentials
        credentials.check(*self._addresses)
        self._random = random.Random(seed)
        self.choose_anew()

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def current(self) -> str:
        return self._addresses[0]

    def choose_anew(self) -> None:
        self._random.shuffle(self._addresses)

    def move_on(self) -> None:
        """After a failure every other address is tried before the same one again."""
        self._addresses.append(self._addresses.pop(0))

    def open_channel(self) -> grpc.aio.Channel:
        return self._credentials.open_channel(self.current, _CHANNEL_OPTIONS)
