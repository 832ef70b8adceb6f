"""How a client shows who it is, and knows whom it talks to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio

from reltrace.transport.address import Address
from reltrace.types.errors import InvalidArgument, invalid

Tls: TypeAlias = "bool | TlsOptions | None"
Token: TypeAlias = "str | Path | None"

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")

_OPTIONS = (
    # Chunks are about 1 MiB, and a message may hold many.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # A stream may be silent for as long as a job takes: pings tell a slow server from a lost one.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # By default gRPC stops after two pings in a silence.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_BY_TURNS = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Files and names of a TLS connection; files are in PEM form.

    Parameters
    ----------
    ca : str or Path, optional
        Certificates of the authorities to trust. Default: those that gRPC ships.
    cert, key : str or Path, optional
        This client's certificate and key, for a server that asks for one (mutual TLS).
    server_name : str, optional
        The name that the server's certificate must be for. Default: the host of the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    @classmethod
    def from_environment(cls) -> TlsOptions:
        """Return what RELTRACE_TLS_CA, _CERT, _KEY and _NAME say."""
        return cls(*(os.environ.get(f"RELTRACE_TLS_{name}") or None for name in _TLS_VARIABLES))


_TLS_VARIABLES = ("CA", "CERT", "KEY", "NAME")


class Security:
    """Token and TLS of one client.

    Parameters
    ----------
    token : str, Path or None
        See `Client`.
    tls : bool, TlsOptions or None
        See `Client`.
    insecure : bool or None
        See `Client`.

    Raises
    ------
    InvalidArgument
        If one of them is of another kind, or a file can not be read.
    """

    def __init__(self, token: Token, tls: Tls, insecure: bool | None) -> None:
        self._tls = _tls(tls)
        self._credentials = None if self._tls is None else _credentials(self._tls)
        self._insecure = flag("RELTRACE_INSECURE") if insecure is None else bool(insecure)
        self._file: Path | None = None
        self._seen: tuple[int, int, int] | None = None
        self._metadata: tuple[tuple[str, str], ...] = ()
        if token is None:
            file = os.environ.get("RELTRACE_TOKEN_FILE")
            token = Path(file) if file else os.environ.get("RELTRACE_TOKEN", "")
        if isinstance(token, Path):
            self._file = token
        elif isinstance(token, str):
            self._metadata = _bearer(token, "token")
        else:
            raise invalid("token", f"must be str or Path, not {type(token).__name__}")
        self.metadata()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with each call; a token's file is read again when it has changed."""
        if self._file is not None:
            try:
                state = self._file.stat()
                seen = (state.st_mtime_ns, state.st_size, state.st_ino)
                if seen != self._seen:
                    self._metadata = _bearer(self._file.read_text(), f"token: {self._file}")
                    self._seen = seen
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "is not text"
                # A file that is being replaced is away for a moment.
                if self._seen is None:
                    raise invalid("token", f"{self._file}: {reason}") from None
        return self._metadata

    def check(self, address: Address) -> None:
        """Check that the token may be sent to an address.

        gRPC would refuse to send credentials of its own over plaintext; ours is metadata.

        Raises
        ------
        InvalidArgument
            If others could read it on the way.
        """
        if (
            self._metadata
            and self._credentials is None
            and not self._insecure
            and not address.is_loopback
        ):
            raise invalid(
                "token",
                f"would travel to {address.target} in plaintext: use TLS (tls=True or RELTRACE_TLS"
                "=1, with a private authority RELTRACE_TLS_CA), or say insecure=True (or "
                "RELTRACE_INSECURE=1) if nobody else reads this network",
            )

    def open(self, address: Address) -> grpc.aio.Channel:
        """Make a channel on the running event loop."""
        options: list[tuple[str, int | str]] = list(_OPTIONS)
        if address.is_loopback:
            # gRPC would look for this machine through the proxy that the environment names.
            options.append(("grpc.enable_http_proxy", 0))
        if address.balanced:
            options.append(("grpc.service_config", _BY_TURNS))
        if self._credentials is None:
            return grpc.aio.insecure_channel(address.target, options=options)
        if self._tls is not None and self._tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        return grpc.aio.secure_channel(address.target, self._credentials, options=options)


def flag(variable: str) -> bool:
    """Return what an environment variable says, yes or no.

    Raises
    ------
    InvalidArgument
        If it says neither.
    """
    said = os.environ.get(variable, "").lower()
    if said not in _TRUE + _FALSE:
        raise invalid(variable, f"must be 1 or 0, not {said!r}")
    return said in _TRUE


def _tls(tls: Tls) -> TlsOptions | None:
    configured = TlsOptions.from_environment()
    if tls is None:
        tls = flag("RELTRACE_TLS") or configured != TlsOptions()
    if tls is False:
        return None
    if tls is True:
        return configured
    if not isinstance(tls, TlsOptions):
        raise invalid("tls", f"must be True, False or TlsOptions, not {type(tls).__name__}")
    return tls


def _credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        missing, given = ("key", "cert") if tls.key is None else ("cert", "key")
        raise invalid(f"tls.{missing}", f"must be given with tls.{given}")
    return grpc.ssl_channel_credentials(
        _pem("tls.ca", tls.ca, "CERTIFICATE"),
        _pem("tls.key", tls.key, "PRIVATE KEY"),
        _pem("tls.cert", tls.cert, "CERTIFICATE"),
    )


def _pem(field: str, path: str | Path | None, what: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise invalid(field, f"{path}: {error.strerror}") from None
    # gRPC takes anything, and then fails every handshake without a word.
    if f"{what}-----".encode() not in content:
        raise invalid(field, f"{path}: holds no {what} in PEM form")
    return content


def _bearer(token: str, where: str) -> tuple[tuple[str, str], ...]:
    token = token.strip()
    if not token:
        if where != "token":
            raise invalid(where, "the file is empty")
        return ()
    if not token.isascii() or not token.isprintable() or " " in token:
        # The token itself is in no message.
        raise InvalidArgument(f"{where}: must be one word of printable ASCII characters")
    return (("authorization", f"Bearer {token}"),)
