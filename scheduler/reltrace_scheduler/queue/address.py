"""Where Redis is and how to get in, without the password in a text that somebody reads."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from reltrace_proto.net import read_line

from reltrace_scheduler.errors import StartError

PASSWORD_VARIABLE = "RELTRACE_REDIS_PASSWORD"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis.

    Parameters
    ----------
    url : str
        ``redis://``, ``rediss://`` or ``unix://``; it may hold a password.
    password : str or None
        Takes the place of the URL's.
    ca : Path or None
        With ``rediss://``: certificates of the authorities to trust, in PEM form; None: those
        of the system.
    """

    url: str
    password: str | None = None
    ca: Path | None = None

    def __repr__(self) -> str:
        """Show it without secrets."""
        return f"RedisAddress({self.shown})"

    @property
    def shown(self) -> str:
        """The URL without secrets."""
        return without_secrets(self.url)


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
        return "password" in parse_qs(urlsplit(url).query)
    except ValueError:
        return "password" in url


def _is_path(url: str) -> bool:
    return url.startswith("unix:///")


def redis_address(
    url: str | None,
    *,
    url_file: Path | None,
    password_file: Path | None,
    ca: Path | None,
    on_command_line: bool,
) -> RedisAddress | None:
    """Put the options together; None: none of them names a Redis.

    Parameters
    ----------
    url : str or None
        As given to ``--redis`` or its variable.
    url_file : Path or None
        Holds the URL instead.
    password_file : Path or None
        Holds the password; without it, RELTRACE_REDIS_PASSWORD may.
    ca : Path or None
        With ``rediss://``: whom to trust.
    on_command_line : bool
        Whether every user of the machine can read `url`.

    Raises
    ------
    StartError
        Options exclude each other, a file can not be read, or a password is in sight.
    """
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
    if password_file is not None:
        password = read_line("--redis-password-file", password_file)
    if ca is not None:
        if not url.startswith("rediss://"):
            raise StartError(f"--redis-ca {ca}: only a rediss:// URL uses it")
        if not ca.is_file():
            raise StartError(f"--redis-ca {ca}: no such file")
    return RedisAddress(url, password, ca)
