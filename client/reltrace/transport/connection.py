"""What a client has of its servers: calls to them, and the submissions that it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from reltrace_proto.net import Credentials

from reltrace.transport.caller import Caller
from reltrace.transport.pending import PendingSubmissions

# Seconds that closing waits for what finishes in the background.
_CLOSE_TIMEOUT = 5.0


class Connection(Caller):
    """A `Caller` that knows which submissions are to be cancelled when their caller leaves."""

    def __init__(self, address: str | None, retry_timeout: float, credentials: Credentials) -> None:
        super().__init__(address, retry_timeout, credentials)
        self.pending = PendingSubmissions(self)
        self._finishing: set[asyncio.Task[None]] = set()

    def finish_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that nobody but `close` waits for, such as an acknowledgement."""
        task = asyncio.create_task(work)
        self.keep(task)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Close the channels; calls that are open end with an error, their jobs are cancelled."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                while self._finishing:
                    await asyncio.wait(self._finishing)
        except TimeoutError:
            pass
        self._closed = True
        await self.pending.close()
        for task in self._background:
            task.cancel()
        await self._servers.close()
