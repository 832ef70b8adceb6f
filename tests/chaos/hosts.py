"""Hosts of network namespaces on this machine: each has a link of its own that can be cut."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

_MARK = "rt"
"""What names of namespaces and links begin with: links have 15 characters at most."""


def unavailable() -> str:
    """Return why there can be no hosts here; empty: they can be."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    probe = f"{_MARK}{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=20)
    if made.returncode:
        return f"network namespaces can not be made: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return ""


class Network:
    """A switch, with this process and some hosts on it.

    Files and Unix sockets are the machine's own everywhere: only the network is apart.

    Parameters
    ----------
    hosts
        Names.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = list(hosts)
        self._run = f"{_MARK}{os.getpid()}"
        self._stack = ExitStack()
        # Of the addresses that are for tests of networks (RFC 2544).
        self._subnet = f"198.18.{secrets.randbelow(256)}"

    def __enter__(self) -> Self:
        _sweep()
        try:
            switch = f"{self._run}s"
            _ip("link", "add", switch, "type", "bridge")
            self._stack.callback(_ip, "link", "delete", switch)
            _ip("address", "add", f"{self._subnet}.1/24", "dev", switch)
            _ip("link", "set", switch, "up")
            for number, host in enumerate(self._hosts):
                space, plug = self._space(host), self._plug(number)
                _ip("netns", "add", space)
                self._stack.callback(_ip, "netns", "delete", space)
                _ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", space)
                # With its last process a namespace takes its link along, but not at once.
                self._stack.callback(_ip, "link", "delete", plug)
                _ip("link", "set", plug, "master", switch, "up")
                inside = ("-n", space)
                _ip(*inside, "link", "set", "lo", "up")
                _ip(*inside, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                _ip(*inside, "link", "set", "eth0", "up")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _space(self, host: str) -> str:
        return f"{self._run}-{host}"

    def _plug(self, number: int) -> str:
        return f"{self._run}p{number}"

    def address(self, host: str) -> str:
        """Return the IP address of a host."""
        return f"{self._subnet}.{10 + self._hosts.index(host)}"

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs another on a host, in the same process."""
        return ["ip", "netns", "exec", self._space(host), *command]

    @contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """Pull a host's plug until the block ends: nobody is told."""
        plug = self._plug(self._hosts.index(host))
        _ip("link", "set", plug, "down")
        try:
            yield
        finally:
            _ip("link", "set", plug, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def _sweep() -> None:
    """Remove what runs have left that were killed."""
    spaces = Path("/run/netns").glob(f"{_MARK}*")
    links = Path("/sys/class/net").glob(f"{_MARK}*s")
    for found, kind in [*((path, "netns") for path in spaces), *((path, "link") for path in links)]:
        owner = re.match(rf"{_MARK}(\d+)", found.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            subprocess.run(
                ["ip", kind, "delete", found.name], capture_output=True, timeout=20, check=False
            )
