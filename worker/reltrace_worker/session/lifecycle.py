"""A worker's process from its first connection to its end."""

import asyncio
import os
import signal
import sys
from typing import Any

import structlog

from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.session import Session
from reltrace_worker.session.watchdog import Watchdog

log = structlog.get_logger()

HANGS = 75
"""Exit code of a worker whose work stood still, or whose device was lost: another may be started at
once."""

_HAND_BACK = 5.0
"""Seconds for what is done to be stored, and as many to tell the scheduler what is not."""


async def work(session: Session, watchdog: Watchdog, drain_grace: float) -> None:
    """Work until a signal or the scheduler asks to stop; end the process where work
    hangs, or the device is lost.

    Raises `WorkerError`: this worker can not go on.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.asked_to_drain.set)
    working = asyncio.create_task(session.run())
    stopping = asyncio.create_task(session.asked_to_drain.wait())
    hanging = asyncio.create_task(watchdog.stuck())
    ends: set[asyncio.Task[Any]] = {working, hanging}
    await asyncio.wait({*ends, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        log.info("worker.drains")
        draining = asyncio.create_task(session.drain(drain_grace))
        await asyncio.wait({*ends, draining}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    if hanging.done():
        leases = hanging.result().leases
        await session.drain(_HAND_BACK, {LeaseKey.of(lease) for lease in leases})
    await asyncio.wait({working}, timeout=_HAND_BACK)
    if hanging.done():
        sys.stderr.flush()
        # Whatever the thread that hangs would have us wait for.
        os._exit(HANGS)
    if working.done():
        working.result()
