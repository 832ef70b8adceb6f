"""Where the schedulers are, how the worker shows who it is, and how it knows whom it talks to."""

import ipaddress
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from reltrace_worker.types.errors import WorkerError

TOKEN_VARIABLE = "RELTRACE_TOKEN"

_DNS = re.compile(r"dns://([^/,]*)/([^/,]+)")
_BY_TURNS = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # Finds a scheduler that vanished without closing.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The scheduler is near: a proxy for the web must not stand between.
    ("grpc.enable_http_proxy", 0),
    # Our own backoff decides when to connect again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class EndpointError(WorkerError):
    """An address, a token or a certificate can not be used; the message names the option."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM form, and a name.

    Parameters
    ----------
    ca : Path or None
        Certificates of the authorities to trust; None: those that gRPC ships.
    cert, key : Path or None
        This worker's certificate and key, for a scheduler that asks for one (mutual TLS).
    server_name : str or None
        The name that the scheduler's certificate must be for; None: the host of the address.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files, which may have changed since the last connection.

        Raises
        ------
        EndpointError
            One can not be read, or is of another kind.
        """
        if (self.cert is None) != (self.key is None):
            raise EndpointError("--tls-cert and --tls-key go together")
        return grpc.ssl_channel_credentials(
            _pem("--tls-ca", self.ca, "CERTIFICATE"),
            _pem("--tls-key", self.key, "PRIVATE KEY"),
            _pem("--tls-cert", self.cert, "CERTIFICATE"),
        )


@dataclass(frozen=True, slots=True)
class Access:
    """What a worker presents, and over what.

    Parameters
    ----------
    token_file : Path or None
        Holds the token; None: environment variable RELTRACE_TOKEN may hold it.
    tls : Tls or None
        None: plaintext.
    insecure : bool
        Send the token in plaintext to other machines too.
    """

    token_file: Path | None = None
    tls: Tls | None = None
    insecure: bool = False

    def token(self) -> str:
        """Return the token, "" without one; its file is read each time.

        Raises
        ------
        EndpointError
            The file can not be read, or holds no token.
        """
        if self.token_file is None:
            token, where = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        else:
            where = f"--token-file {self.token_file}"
            try:
                token = self.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "is not text"
                raise EndpointError(f"{where}: {reason}") from None
            if not token:
                raise EndpointError(f"{where}: the file is empty")
        if not token.isascii() or not token.isprintable() or " " in token:
            # The token itself is in no message.
            raise EndpointError(f"{where}: must be one word of printable ASCII characters")
        return token


class Endpoints:
    """The schedulers that a worker may connect to.

    Parameters
    ----------
    addresses : str
        ``HOST:PORT`` or ``dns:///NAME:PORT``, or several with commas between.
    access : Access
        Token and TLS.
    seed : int or None
        Of the choice between them; None: another one in each process, so that workers spread.

    Raises
    ------
    EndpointError
        An address is malformed, a file can not be used, or the token would be sent in plaintext
        to another machine.
    """

    def __init__(self, addresses: str, access: Access, seed: int | None = None) -> None:
        self._addresses = list(dict.fromkeys(part.strip() for part in addresses.split(",")))
        self._access = access
        hosts = [_host(address) for address in self._addresses]
        if access.tls is not None:
            access.tls.credentials()
        elif access.token() and not access.insecure and not all(map(_is_loopback, hosts)):
            raise EndpointError(
                f"--scheduler {addresses}: the token would travel to another machine in plaintext; "
                "add --tls (with a private authority, --tls-ca), or say --insecure if nobody else "
                "reads this network"
            )
        # From a random one on, in turn: after a failure every other comes before the same again.
        random.Random(seed).shuffle(self._addresses)

    def __len__(self) -> int:
        """Return the number of addresses."""
        return len(self._addresses)

    @property
    def current(self) -> str:
        """The address to connect to."""
        return self._addresses[0]

    def move_on(self) -> None:
        """Make the next address the current one."""
        self._addresses.append(self._addresses.pop(0))

    def token(self) -> str:
        """Return the token as it is now, "" without one."""
        return self._access.token()

    def open(self) -> grpc.aio.Channel:
        """Make a channel to the current address."""
        options: list[tuple[str, int | str]] = list(_CHANNEL_OPTIONS)
        if _DNS.fullmatch(self.current):
            # One call lives on one of the name's addresses; the next may take another.
            options.append(("grpc.service_config", _BY_TURNS))
        tls = self._access.tls
        if tls is None:
            return grpc.aio.insecure_channel(self.current, options=options)
        if tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        return grpc.aio.secure_channel(self.current, tls.credentials(), options=options)


def _host(address: str) -> str:
    dns = _DNS.fullmatch(address)
    host, _, port = (dns.group(2) if dns else address).rpartition(":")
    numbered = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not host or not numbered or "/" in host:
        raise EndpointError(
            f"--scheduler {address!r}: must be HOST:PORT, dns:///NAME:PORT, or several of them "
            "with commas between"
        )
    return host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _pem(option: str, path: Path | None, what: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EndpointError(f"{option} {path}: {error.strerror}") from None
    # gRPC takes anything, and then fails every handshake without a word.
    if f"{what}-----".encode() not in content:
        raise EndpointError(f"{option} {path}: holds no {what} in PEM form")
    return content
