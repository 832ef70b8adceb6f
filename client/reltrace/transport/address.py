"""Addresses of servers: one, several, or all behind a name."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from reltrace.types.errors import invalid

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "RELTRACE_SERVER"

# dns:///name:port, or dns://nameserver/name:port.
_DNS = re.compile(r"dns://([^/,]*)/([^/,]+)")
_MOST = 64


@dataclass(frozen=True, slots=True)
class Address:
    """What one channel connects to.

    Attributes
    ----------
    target : str
        As gRPC takes it.
    host : str
        A host name, an IP address, or "" for a Unix socket.
    balanced : bool
        A name whose every address is used, by turns.
    """

    target: str
    host: str
    balanced: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent stays on this machine. No name but "localhost" is looked up."""
        if self.host in ("", "localhost"):
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_addresses(address: str | None) -> tuple[str, tuple[Address, ...]]:
    """Return the address to use, and its parts.

    Parameters
    ----------
    address : str or None
        "host:port", "dns:///name:port", "unix:path", or several of them with commas between;
        None: environment variable RELTRACE_SERVER, else 127.0.0.1:50051.

    Raises
    ------
    InvalidArgument
        If it is of another form.
    """
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if not isinstance(address, str):
        raise invalid("address", f"must be str, not {type(address).__name__}")
    parts = [part.strip() for part in address.split(",")]
    if len(parts) > _MOST:
        raise invalid("address", f"names {len(parts)} servers; at most {_MOST} are allowed")
    return address, tuple(dict.fromkeys(_parse(part) for part in parts))


def _parse(text: str) -> Address:
    if text.startswith("unix:"):
        return Address(text, "")
    dns = _DNS.fullmatch(text)
    host, _, port = (dns.group(2) if dns else text).rpartition(":")
    numbered = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not host or not numbered or "/" in host:
        raise invalid(
            "address",
            f'must be "host:port", such as "{DEFAULT_ADDRESS}", "dns:///name:port", or several '
            f"of them with commas between, not {text!r}",
        )
    return Address(text, host, balanced=dns is not None)
