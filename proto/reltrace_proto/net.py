"""How to reach a server and show who calls: addresses, tokens, TLS files.

Clients and workers connect with what is here; the scheduler reads its TLS and token files with it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]
ChannelOptions = Sequence[tuple[str, int | str]]
FailureHandler = Callable[[OSError | ValueError], object]

MAX_ADDRESSES = 64

# dns:///name:port, or dns://nameserver/name:port.
_DNS = re.compile(r"dns://[^/,]*/([^/,]+)")

_CHANNEL_OPTIONS: ChannelOptions = (
    # Chunks are about 1 MiB, and a message may hold many.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A stream may be silent for as long as a job takes: pings tell a slow server from a lost one.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # By default gRPC stops after two pings without data.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # By default a name is looked up again after 30 s, by when a caller has given up.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
)
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


class SettingError(ValueError):
    """A setting can not be used.

    Its `field` is "address", "token", "tls.ca", "tls.cert", "tls.key" or a command's option.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the addresses of a list with commas between, in the form that gRPC takes.

    They are "HOST:PORT", "dns:///NAME:PORT", "dns://NAMESERVER/NAME:PORT" or "unix:PATH".
    """
    addresses = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for address in addresses:
        dns = _DNS.fullmatch(address)
        host, _, port = (dns[1] if dns else address).rpartition(":")
        valid_port = port.isascii() and port.isdigit() and 0 < int(port) < 65536
        if not address.startswith("unix:") and not (host and valid_port and "/" not in host):
            raise SettingError(
                "address",
                'must be "HOST:PORT", "dns:///NAME:PORT", or several of them with commas between, '
                f"not {address!r}",
            )
    if len(addresses) > MAX_ADDRESSES:
        raise SettingError(
            "address", f"names {len(addresses)} servers; at most {MAX_ADDRESSES} are allowed"
        )
    return addresses


def host_and_port(option: str, address: str) -> tuple[str, int]:
    """Split the HOST:PORT to listen on; port 0 is any free one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingError(f"{option} {address}", "must be HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Return whether only this machine can be at an address. "localhost" is the only known name."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class FileValue(Generic[T]):
    """What `read` makes of some files, read again when they have changed.

    A file that is being replaced may be missing or incomplete for a moment: the last value stays,
    and `failed` takes the error, once for each change. The first read must succeed.
    """

    def __init__(
        self,
        read: Callable[[], T],
        paths: Sequence[Path],
        failed: FailureHandler = lambda error: None,
    ) -> None:
        self._read = read
        self._paths = paths
        self._failed = failed
        self._read_state = self._state()
        self.value = read()

    def refresh(self) -> bool:
        """Read the files again if one has changed, and return whether that gave a new value."""
        state = self._state()
        if state == self._read_state:
            return False
        self._read_state = state
        try:
            self.value = self._read()
        except (OSError, ValueError) as error:
            self._failed(error)
            return False
        return True

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_file_state(path) for path in self._paths]


def _file_state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_pem(field: str, path: str | Path, kind: str) -> bytes:
    """Return what a PEM file holds; `kind` is "CERTIFICATE" or "PRIVATE KEY"."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SettingError(field, f"{path}: {error.strerror}") from None
    # gRPC takes anything, and then fails every handshake without saying why.
    if f"{kind}-----".encode() not in content:
        raise SettingError(field, f"{path}: holds no {kind} in PEM form")
    return content


def read_line(field: str, path: Path) -> str:
    """Return the only line of a file."""
    try:
        line = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise SettingError(field, f"{path}: {reason}") from None
    if not line or "\n" in line:
        raise SettingError(field, f"{path}: must hold one line")
    return line


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Files and names of a TLS connection; files are in PEM form.

    Parameters
    ----------
    ca : str or Path, optional
        Certificates of the authorities to trust. Default: those that gRPC ships.
    cert, key : str or Path, optional
        The certificate and key to show to a server that asks for one (mutual TLS).
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
        names = ("CA", "CERT", "KEY", "NAME")
        return cls(*(os.environ.get(f"RELTRACE_TLS_{name}") or None for name in names))

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files."""
        if (self.cert is None) != (self.key is None):
            missing, other = ("key", "certificate") if self.key is None else ("cert", "key")
            raise SettingError(f"tls.{missing}", f"must be given together with the {other}")
        return grpc.ssl_channel_credentials(
            None if self.ca is None else read_pem("tls.ca", self.ca, "CERTIFICATE"),
            None if self.key is None else read_pem("tls.key", self.key, "PRIVATE KEY"),
            None if self.cert is None else read_pem("tls.cert", self.cert, "CERTIFICATE"),
        )


def token_from_environment() -> str | Path:
    """Return the file that RELTRACE_TOKEN_FILE names, else the token in RELTRACE_TOKEN, else ""."""
    file = os.environ.get("RELTRACE_TOKEN_FILE")
    return Path(file) if file else os.environ.get("RELTRACE_TOKEN", "")


class Credentials:
    """What a caller shows to servers, and how the connection to them is protected.

    Parameters
    ----------
    token : str or Path
        The token, or a file that holds it; "": none.
    tls : TlsOptions, optional
        Default: plaintext.
    insecure : bool, default False
        Allow the token to be sent in plaintext to another machine.
    failed : callable
        Takes the error of a file that was usable before; see `FileValue`.
    """

    def __init__(
        self,
        token: str | Path = "",
        tls: TlsOptions | None = None,
        *,
        insecure: bool = False,
        failed: FailureHandler = lambda error: None,
    ) -> None:
        self._insecure = insecure
        self._tls = tls
        self._metadata = FileValue(
            lambda: _metadata(token), [token] if isinstance(token, Path) else [], failed
        )
        files = [tls.ca, tls.cert, tls.key] if tls else []
        self._channel_credentials = FileValue(
            lambda: tls.credentials() if tls else None,
            [Path(file) for file in files if file is not None],
            failed,
        )

    def metadata(self) -> Metadata:
        """Return what goes with each call: the token, if there is one."""
        self._metadata.refresh()
        return self._metadata.value

    def check(self, *addresses: str) -> None:
        """Check that nobody on the way to these addresses could read the token.

        gRPC refuses to send its own call credentials in plaintext; our token is plain metadata.
        """
        remote = [address for address in addresses if not is_loopback(address)]
        if self._metadata.value and remote and self._tls is None and not self._insecure:
            raise SettingError(
                "token",
                f"would be sent to {remote[0]} in plaintext: use TLS (RELTRACE_TLS=1, and for a "
                "private authority RELTRACE_TLS_CA=FILE), or set RELTRACE_INSECURE=1 if nobody "
                "else can read this network",
            )

    def open_channel(self, address: str, options: ChannelOptions = ()) -> grpc.aio.Channel:
        """Make a channel on the running event loop."""
        options = [*_CHANNEL_OPTIONS, *options]
        if is_loopback(address):
            # gRPC would look for this machine behind the proxy that the environment names.
            options.append(("grpc.enable_http_proxy", 0))
        if address.startswith("dns:"):
            # Each call goes to the next of the name's addresses.
            options.append(("grpc.service_config", _ROUND_ROBIN))
        if self._tls is not None and self._tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        self._channel_credentials.refresh()
        credentials = self._channel_credentials.value
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)


def _metadata(token: str | Path) -> Metadata:
    where = f"{token}: " if isinstance(token, Path) else ""
    text = read_line("token", token) if isinstance(token, Path) else token.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        # The token itself is in no message.
        raise SettingError("token", f"{where}must be one word of printable ASCII characters")
    return (("authorization", f"Bearer {text}"),) if text else ()
