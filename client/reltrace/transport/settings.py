"""Connection settings from a caller's arguments and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from reltrace_proto.net import (
    Credentials,
    SettingError,
    TlsOptions,
    parse_addresses,
    token_from_environment,
)

from reltrace.types.errors import invalid

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "RELTRACE_SERVER"

Tls: TypeAlias = "bool | TlsOptions | None"
Token: TypeAlias = "str | Path | None"

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def server_addresses(address: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the address, given or from the environment, and the servers that it names."""
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if not isinstance(address, str):
        raise invalid("address", f"must be str, not {type(address).__name__}")
    with as_invalid_argument():
        return address, parse_addresses(address)


def credentials(token: Token, tls: Tls, insecure: bool | None) -> Credentials:
    """Return the credentials that arguments of `Client` and the environment name."""
    if token is None:
        token = token_from_environment()
    if not isinstance(token, str | Path):
        raise invalid("token", f"must be str or Path, not {type(token).__name__}")
    if tls is not None and not isinstance(tls, bool | TlsOptions):
        raise invalid("tls", f"must be True, False or TlsOptions, not {type(tls).__name__}")
    if not isinstance(tls, TlsOptions):
        configured = TlsOptions.from_environment()
        if tls is None:
            tls = flag("RELTRACE_TLS") or configured != TlsOptions()
        tls = configured if tls else None
    if insecure is None:
        insecure = flag("RELTRACE_INSECURE")
    with as_invalid_argument():
        return Credentials(token, tls, insecure=bool(insecure))


@contextmanager
def as_invalid_argument() -> Iterator[None]:
    """Raise errors of `reltrace_proto.net` as InvalidArgument."""
    try:
        yield
    except SettingError as error:
        raise invalid(error.field, error.reason) from None


def flag(variable: str) -> bool:
    """Return whether an environment variable is set to true."""
    value = os.environ.get(variable, "").lower()
    if value not in _TRUE + _FALSE:
        raise invalid(variable, f"must be 1 or 0, not {value!r}")
    return value in _TRUE
