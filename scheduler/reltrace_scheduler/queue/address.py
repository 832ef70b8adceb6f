"""The address of Redis and its password, which no message shows."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from reltrace_proto.net import read_line

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError

PASSWORD_VARIABLE = "RELTRACE_REDIS_PASSWORD"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    url: str
    """``redis://`` (several hosts: of a Redis Cluster), ``unix://``, or ``redis+sentinel://``, or
    with ``rediss`` for TLS; it may hold passwords."""
    password: str | None = None
    """Takes the place of the URL's."""
    ca: Path | None = None
    """With TLS: PEM file of the authorities to trust; None: the system's."""

    def __repr__(self) -> str:
        return f"RedisAddress({self.shown})"

    @property
    def shown(self) -> str:
        return without_secrets(self.url)

    @property
    def is_sentinel(self) -> bool:
        return self.url.partition("://")[0].endswith("+sentinel")

    @property
    def single(self) -> list[str]:
        """The same URL with one of its hosts each."""
        parts = re.fullmatch(r"(redis[^:]*://)([^/?#]*@)?([^/?#]*)(.*)", self.url, re.DOTALL)
        if parts is None:
            return [self.url]
        scheme, credentials, hosts, rest = parts.groups(default="")
        return [f"{scheme}{credentials}{host}{rest}" for host in hosts.split(",")]


def without_secrets(url: str) -> str:
    """Return a URL, however malformed, for people to read.

    >>> without_secrets("redis://app:geheim@10.0.0.5:6379/0")
    'redis://app:***@10.0.0.5:6379/0'
    """
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    # The last @ ends the password, whatever characters it is of; a path may hold one too.
    credentials, at, place = ("", "", rest) if _is_path(url) else rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    # A name without a password may be a password in the wrong place.
    masked = f"{user}:***@" if colon else "***@" if at else ""
    path, question, _ = place.partition("?")
    return f"{scheme}{separator}{masked}{path}{'?...' if question else ''}"


def has_password(url: str) -> bool:
    """Return whether a URL holds a password, or something in the place of one."""
    if "@" in url and not _is_path(url):
        return True
    try:
        query = parse_qs(urlsplit(url).query)
        return "password" in query or "sentinel_password" in query
    except ValueError:
        return "password" in url


def _is_path(url: str) -> bool:
    return url.startswith("unix:///")


def redis_address(settings: Settings, *, on_command_line: bool) -> RedisAddress | None:
    """Return the Redis that the options name; None: they name none.

    Parameters
    ----------
    on_command_line : bool
        Whether every user of the machine can read ``settings.redis``.

    Raises
    ------
    StartError
        Options exclude each other, a file can not be read, or a password is visible.
    """
    url, url_file, ca = settings.redis, settings.redis_url_file, settings.redis_ca
    if url is not None and url_file is not None:
        raise StartError("--redis and --redis-url-file exclude each other")
    if url is not None and on_command_line and has_password(url):
        raise StartError(
            f"--redis {without_secrets(url)}: every user of this machine can read a password on "
            "the command line; put the URL into RELTRACE_REDIS or a file named by "
            f"--redis-url-file, or only the password into {PASSWORD_VARIABLE} or a file named by "
            "--redis-password-file"
        )
    if url_file is not None:
        url = read_line("--redis-url-file", url_file)
    if url is None:
        return None
    password = os.environ.get(PASSWORD_VARIABLE) or None
    if settings.redis_password_file is not None:
        password = read_line("--redis-password-file", settings.redis_password_file)
    if ca is not None:
        if not url.startswith(("rediss://", "rediss+sentinel://")):
            raise StartError(f"--redis-ca {ca}: only a rediss:// URL uses it")
        if not ca.is_file():
            raise StartError(f"--redis-ca {ca}: no such file")
    return RedisAddress(url, password, ca)
