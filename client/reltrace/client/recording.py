"""A record of the jobs that the server holds for a client, so that a killed run leaves none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from reltrace.client.sync_client import Client


@contextmanager
def recording(
    client: Client,
    previous: Mapping[str, int],
    record: Callable[[Mapping[str, int]], None],
) -> Iterator[None]:
    """Record the submissions of a client meanwhile.

    Parameters
    ----------
    client : Client
        The client.
    previous : mapping of str to int
        What a process that was killed recorded last: cancelled before anything else.
    record : callable
        See `PendingSubmissions.record`.
    """
    pending = client._connection.pending
    pending.record = record
    try:
        client._loop.run(pending.cancel_recorded(previous))
        yield
    finally:
        pending.record = None
