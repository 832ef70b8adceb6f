"""Records the jobs that the server holds for a client, so that the next run can cancel them."""

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
    """Call `record` with the submissions of a client; see `PendingSubmissions.record`.

    The submissions of the `previous` record, of a process that was killed, are cancelled first.
    """
    pending = client._connection.pending
    pending.record = record
    try:
        client._loop.run(pending.cancel_recorded(previous))
        yield
    finally:
        pending.record = None
