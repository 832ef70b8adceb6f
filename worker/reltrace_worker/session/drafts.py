"""Texts as they are generated, for clients that read along: from the engine to the session.

Drafts are a hint beside the results: what is noted while nobody takes it is joined, and what may
have been lost with a connection is sent again from the beginning on the next one.
"""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reltrace_proto.v1 import types_pb2

from reltrace_worker.session.leases import LeaseKey

if TYPE_CHECKING:
    from reltrace_worker.models.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
"""What tokenizers decode the beginning of a character to."""


@dataclass(slots=True)
class _Text:
    """The tokens of a text, and how many tokens and what text of it were taken."""

    vocabulary: "Vocabulary"
    ids: tuple[int, ...] = ()
    taken: int = 0
    text: str = ""

    def draft(self, key: LeaseKey, ids: tuple[int, ...]) -> types_pb2.Draft:
        """Return what is new in `ids`, and note it as taken."""
        first = self.taken
        # All of it each time: tokens one by one have other spaces and no whole characters.
        text = self.vocabulary.decoded(ids).rstrip(_REPLACEMENT)
        added = text[len(self.text) :] if text.startswith(self.text) else ""
        self.text += added
        self.taken = len(ids)
        return types_pb2.Draft(
            job_id=key.job_id,
            attempt=key.attempt,
            first=first,
            token_ids=ids[first:],
            tokens=self.vocabulary.texts(ids[first:]),
            text=added,
        )


class Drafts:
    """Takes texts as they grow, on any thread, and gives out what is new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: dict[LeaseKey, _Text] = {}
        self._changed: set[LeaseKey] = set()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def note(self, key: LeaseKey, ids: Sequence[int], vocabulary: "Vocabulary") -> None:
        """Note all tokens of a text so far."""
        with self._lock:
            text = self._texts.setdefault(key, _Text(vocabulary))
            if len(ids) == len(text.ids):
                return
            text.ids = tuple(ids)
            self._changed.add(key)
            self._wake()

    def restart(self) -> None:
        """Give out every text from its beginning: what was taken may not have arrived."""
        with self._lock:
            # New ones: what is being taken at this moment is noted in the old.
            for key, text in self._texts.items():
                self._texts[key] = _Text(text.vocabulary, text.ids)
            self._changed.update(self._texts)
            self._wake()

    def forget(self, keys: Iterable[LeaseKey]) -> None:
        """Forget texts: their result is there, or nobody waits for them."""
        with self._lock:
            for key in keys:
                self._texts.pop(key, None)
                self._changed.discard(key)

    def _wake(self) -> None:
        if self._changed and self._waiting is not None:
            loop, arrived = self._waiting
            loop.call_soon_threadsafe(arrived.set)

    async def next(self) -> list[types_pb2.Draft]:
        """Wait until something is new; return it, one draft per text."""
        arrived = asyncio.Event()
        with self._lock:
            self._waiting = asyncio.get_running_loop(), arrived
            if self._changed:
                arrived.set()
        try:
            await arrived.wait()
        finally:
            with self._lock:
                self._waiting = None
        return await asyncio.to_thread(self._take)

    def _take(self) -> list[types_pb2.Draft]:
        with self._lock:
            # With their tokens as they are now: of what is noted meanwhile there is another draft.
            texts = [
                (key, self._texts[key], self._texts[key].ids)
                for key in sorted(self._changed, key=str)
            ]
            self._changed.clear()
        return [text.draft(key, ids) for key, text, ids in texts]
