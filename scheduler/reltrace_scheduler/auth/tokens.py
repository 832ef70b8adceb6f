"""Tokens: made here, kept as hashes in a file, found again by what a caller presents."""

import fcntl
import hashlib
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from reltrace_proto.net import FileValue

from reltrace_scheduler.auth.identity import (
    DEFAULT_TENANT,
    TENANT_NAME,
    TENANT_RULE,
    Identity,
    Role,
)
from reltrace_scheduler.errors import StartError, UnauthenticatedError

log = structlog.get_logger()

_PREFIX = "rlt_"
"""Lets scanners for leaked secrets recognize a token."""

_SECRET_BYTES = 32
_REFRESH_EVERY = 1.0
"""Seconds between checks of the file."""

_MAX_FILE_BYTES = 4 << 20

_TEXTS = ("name", "role", "sha256", "tenant")
_FIELDS = (*_TEXTS, "expires")


class TokenError(ValueError):
    """An entry or a file of tokens is not as it must be; the message says where."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One token, as the file knows it; raises TokenError where a field is not allowed."""

    name: str
    """Unique in its file."""
    role: Role
    tenant: str
    sha256: str
    """Of the token's text, in hexadecimal."""
    expires: datetime | None = None
    """From when on it is refused; None: never."""

    def __post_init__(self) -> None:
        for field, value in (("name", self.name), ("tenant", self.tenant)):
            if not re.fullmatch(TENANT_NAME, value):
                raise TokenError(f"{field} {value!r}: {TENANT_RULE}")
        if self.role is Role.WORKER and self.tenant != DEFAULT_TENANT:
            raise TokenError(f"tenant {self.tenant!r}: a worker works for every tenant")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise TokenError("sha256: must be 64 digits 0-9a-f")
        if self.expires is not None and self.expires.tzinfo is None:
            raise TokenError("expires: must have a time zone, as in 2030-01-31T12:00:00Z")

    @property
    def identity(self) -> Identity:
        return Identity(self.name, self.tenant, self.role)

    def to_toml(self) -> str:
        # All values are of characters that TOML takes as they are.
        tenant = "" if self.role is Role.WORKER else f'tenant = "{self.tenant}"\n'
        expires = "" if self.expires is None else f"expires = {self.expires.isoformat()}\n"
        return (
            f'[[token]]\nname = "{self.name}"\nrole = "{self.role}"\n{tenant}'
            f'sha256 = "{self.sha256}"\n{expires}'
        )


def make(
    name: str, role: Role, tenant: str = DEFAULT_TENANT, expires: datetime | None = None
) -> tuple[str, Entry]:
    """Make a token of 256 random bits, which is kept nowhere, and the entry that is kept."""
    token = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    # A plain hash is enough: 256 random bits can not be guessed.
    return token, Entry(name, role, tenant, hashlib.sha256(token.encode()).hexdigest(), expires)


def in_time(text: str) -> datetime:
    """Return the time in so many days or hours, such as "30d"; raises TokenError."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([dh])", text, re.ASCII)
    if match is None:
        raise TokenError(f"--expires {text}: must be days or hours such as 30d or 12h")
    length = timedelta(hours=int(match[1]) * (24 if match[2] == "d" else 1))
    return (datetime.now(UTC) + length).replace(microsecond=0)


def parse(text: str) -> tuple[Entry, ...]:
    """Read the content of a file of tokens; raises TokenError."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TokenError(f"is not TOML: {error}") from None
    tables = content.pop("token", [])
    if content:
        raise TokenError(f"{min(content)!r}: only [[token]] tables are allowed")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise TokenError("token: must be [[token]] tables")
    entries: dict[str, Entry] = {}
    for number, table in enumerate(tables, start=1):
        try:
            entry = _entry(table)
        except TokenError as error:
            raise TokenError(f"token {number}: {error}") from None
        if entry.name in entries:
            raise TokenError(f"token {number}: name {entry.name!r} is there twice")
        entries[entry.name] = entry
    return tuple(entries.values())


def _entry(table: dict[str, Any]) -> Entry:
    if unknown := sorted(table.keys() - set(_FIELDS)):
        raise TokenError(f"{unknown[0]!r} is none of {', '.join(_FIELDS)}")
    values = {"tenant": DEFAULT_TENANT} | table
    for field in _TEXTS:
        if not isinstance(values.get(field), str):
            raise TokenError(f"{field}: must be a string")
    if values["role"] not in list(Role):
        raise TokenError(f"role {values['role']!r}: must be one of {', '.join(Role)}")
    if not isinstance(values.get("expires", None), datetime | None):
        raise TokenError("expires: must be a time such as 2030-01-31T12:00:00Z, without quotes")
    return Entry(**values | {"role": Role(values["role"])})


def append(path: Path, entry: Entry) -> None:
    """Add an entry to a file, which is made if it is missing, for its owner only."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if any(known.name == entry.name for known in parse(text)):
            raise TokenError(
                f"name {entry.name!r} is in {path} already: choose another, or delete that entry"
            )
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        file.write(gap + entry.to_toml())


class Tokens:
    """The tokens of a file, which is read again when it changes.

    A new content that is broken is logged, and the old tokens stay; at first it is a StartError.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock()
        try:
            self._file = FileValue(self._read, [path], self._log_failure)
        except (OSError, TokenError) as error:
            raise StartError(f"--tokens {path}: {_reason(error)}") from error
        if not self._file.value:
            raise StartError(
                f"--tokens {path}: holds no token; "
                f"`reltrace-scheduler token --file {path} ...` makes one"
            )

    def find(self, token: str) -> Identity:
        """Return whose token it is; raises UnauthenticatedError if it is not valid any more."""
        self._refresh()
        # The time of the lookup may reveal a part of a hash; no token can be derived from that.
        found = self._file.value.get(hashlib.sha256(token.encode()).hexdigest())
        if found is None:
            raise UnauthenticatedError(
                "the token is not known here, or was withdrawn: ask the operator for a new one"
            )
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise UnauthenticatedError(
                f"the token {found.name!r} expired at {found.expires.isoformat()}: "
                "ask the operator for a new one"
            )
        return found.identity

    def _refresh(self) -> None:
        """Read the file again if it has changed; at most once a second."""
        now = self._clock()
        if now - self._checked_at < _REFRESH_EVERY:
            return
        self._checked_at = now
        if self._file.refresh():
            log.info("tokens.read", file=str(self._path), tokens=len(self._file.value))

    def _log_failure(self, error: OSError | ValueError) -> None:
        log.error("tokens.unreadable", file=str(self._path), error=_reason(error), kept="old")

    def _read(self) -> dict[str, Entry]:
        with self._path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise TokenError(f"is longer than {_MAX_FILE_BYTES} bytes")
        try:
            return {entry.sha256: entry for entry in parse(content.decode())}
        except UnicodeDecodeError:
            raise TokenError("is not UTF-8") from None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or "" if isinstance(error, OSError) else str(error)
