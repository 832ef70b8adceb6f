"""Forked processes: gRPC works in one only if no channel was open when it was forked."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import grpc.aio

from reltrace.types.errors import TraceError

# Names of the threads that gRPC's core keeps until some 20 ms after the last channel was closed.
_GRPC_THREADS = {"event_engine", "grpc_global_tim", "lifeguard"}
# Seconds. Threads that are there for longer are not those of our channels.
_SHUTDOWN = 1.0

# What has open channels in this process, and these channels.
_open: set[object] = set()
_channels: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()
# Those of the parent, in a forked child: gRPC hangs when it frees them.
_inherited: list[grpc.aio.Channel] = []
_closed_at = float("-inf")
_forked_while_open = False


def opened(owner: object, channels: Iterable[grpc.aio.Channel]) -> None:
    """Note the channels that `owner` has opened, until it calls `closed`."""
    _open.add(owner)
    _channels.update(channels)


def closed(owner: object) -> None:
    global _closed_at
    _open.discard(owner)
    _closed_at = time.monotonic()


def advice() -> str:
    """Return how to use a client in a process that was forked."""
    if not _forked_while_open:
        return "make a new one in each process"
    return (
        "a client was open in its parent, and gRPC can not be used in a process that is forked "
        'then: start it by the method "spawn" or "forkserver" of multiprocessing, or close the '
        "client before the fork and make a new one in each process"
    )


def check_fork() -> None:
    """Raise `TraceError` in a process in which a call would hang or crash."""
    if _forked_while_open:
        raise TraceError(f"this process was forked: {advice()}")


def _before_fork() -> None:
    while not _open and time.monotonic() - _closed_at < _SHUTDOWN and _threads() & _GRPC_THREADS:
        time.sleep(0.002)


def _threads() -> set[str]:
    try:
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    except OSError:
        # Not Linux, or a thread has just ended.
        return _GRPC_THREADS
    return {name.strip() for name in names}


def _in_child() -> None:
    global _forked_while_open
    _forked_while_open = _forked_while_open or bool(_open)
    _inherited.extend(_channels)


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
