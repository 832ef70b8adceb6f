"""Links between processes of this machine that can be cut: nobody is told, and nothing arrives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self

_BUFFER = 1 << 16


class Link:
    """Ports of this process, each of which leads to one address. See `Links`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.held = 0
        """Bytes that have had to wait because the link was cut."""
        self._servers: list[asyncio.Server] = []
        self._loop = loop
        self._whole = asyncio.Event()
        self._whole.set()

    @property
    def address(self) -> str:
        """All ports, as clients and workers take addresses."""
        ports = [server.sockets[0].getsockname()[1] for server in self._servers]
        return ",".join(f"127.0.0.1:{port}" for port in ports)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Let nothing through until the block ends, neither data nor the end of a connection."""
        self._loop.call_soon_threadsafe(self._whole.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._whole.set)

    async def listen(self, targets: Sequence[tuple[str, int]]) -> None:
        for target in targets:
            connect = partial(self._connect, target)
            self._servers.append(await asyncio.start_server(connect, "127.0.0.1", 0))

    async def close(self) -> None:
        """Take no more connections."""
        for server in self._servers:
            server.close()

    async def _connect(
        self,
        target: tuple[str, int],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        await self._whole.wait()
        try:
            there, back = await asyncio.open_connection(*target)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))
        finally:
            back.close()
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_BUFFER):
                if not self._whole.is_set():
                    self.held += len(data)
                    await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
        # Whoever reads from there learns it, and the other direction ends as well.
        writer.close()


class Links:
    """Makes links, and carries what goes over them in a thread of its own."""

    def __enter__(self) -> Self:
        self._made: list[Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(link.close() for link in self._made), return_exceptions=True)

    def to(self, targets: Sequence[tuple[str, int]]) -> Link:
        """Make a link to these addresses."""
        link = Link(self._loop)
        self._made.append(link)
        asyncio.run_coroutine_threadsafe(link.listen(targets), self._loop).result(10)
        return link
