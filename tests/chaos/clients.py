"""Clients that keep submitting, each in a process of its own, and the proof that they leave."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from chaos import checks
from chaos.cluster import RESULT_TTL, Cluster
from chaos.part import Part
from waiting import wait_until

_FINISH = 60.0
"""Seconds for the clients to finish what they began."""

_NUMBERS = 100_000_000
"""Numbers of jobs that each client has for itself."""


class Clients:
    """Some that speak gRPC themselves and may be killed, and one with the SDK.

    Parameters
    ----------
    cluster
        Which they call.
    seed
        Of what they submit.
    raw
        How many of the first kind.
    trees
        What each of them runs, the one with the SDK last: sources of another commit, or these.
    """

    def __init__(
        self, cluster: Cluster, seed: int, raw: int = 2, trees: Sequence[Path | None] = ()
    ) -> None:
        self._trees = list(trees) or [None] * (raw + 1)
        self._cluster = cluster
        self._seed = seed
        self._until = cluster.folder / "until"
        self._until.unlink(missing_ok=True)
        self._journals: dict[str, Path] = {}
        self.raw = [self._start("raw_client", index) for index in range(raw)]
        self.sdk = self._start("sdk_client", raw)

    def _start(self, kind: str, index: int) -> Part:
        name = f"{kind}{index}"
        journal = self._journals[name] = self._cluster.folder / f"{name}.jsonl"
        return self._cluster.start_module(
            name, f"chaos.{kind}", *self._cluster.connection_of(name),
            "--journal", str(journal), "--seed", str(self._seed * 100 + index),
            "--first", str(index * _NUMBERS), "--until", str(self._until), host="client",
            tree=self._trees[index],
        )  # fmt: skip

    def progress(self) -> int:
        """Return a number that grows with every result that a client has."""
        return sum(path.stat().st_size for path in self._journals.values() if path.exists())

    def wait_for_progress(self, seconds: float = 60.0) -> None:
        """Wait until every client has had something more."""
        before = {path: path.stat().st_size for path in self._journals.values() if path.exists()}
        for path in self._journals.values():
            wait_until(
                lambda path=path: path.exists() and path.stat().st_size > before.get(path, 0),
                f"{path.stem} gets a result",
                seconds,
            )

    def wait_for_silence(self, seconds: float) -> None:
        """Wait until nothing has been delivered to any client for so long."""
        with self.gaps() as gaps:
            wait_until(lambda: gaps[-1] >= seconds, "results stop")

    @contextmanager
    def gaps(self) -> Iterator[list[float]]:
        """Note the times between results until the block ends: seconds, the longest last."""
        longest = [0.0]
        over = threading.Event()

        def watch() -> None:
            seen, since = self.progress(), time.monotonic()
            # Not a wait for anything: how finely time is measured.
            while not over.wait(0.01):
                if (now := self.progress()) != seen:
                    seen, since = now, time.monotonic()
                if (gap := time.monotonic() - since) > longest[-1]:
                    longest.append(gap)

        watcher = threading.Thread(target=watch, name="gaps")
        watcher.start()
        try:
            yield longest
        finally:
            over.set()
            watcher.join()

    def finish(self, tally: checks.Tally | None = None) -> checks.Tally:
        """Let them finish what they began; return what they saw, and what was wrong with it."""
        tally = tally or checks.Tally()
        self._until.touch()
        for part in (*self.raw, self.sdk):
            part.finish(_FINISH)
        for name, path in self._journals.items():
            (checks.raw if name.startswith("raw") else checks.sdk)(path, tally)
        lost = re.findall(r"the server has lost (\d+) accepted jobs", self.sdk.log.read_text())
        tally.sdk_submitted_again = sum(map(int, lost))
        if lost and not tally.losses:
            tally.fault(self.sdk.name, f"submitted {lost} jobs again: nothing can have been lost")
        for part in (*self._cluster.parts, *self.raw, self.sdk):
            for death in part.deaths:
                # A scheduler that starts while Redis is away says so and ends.
                if "can not be reached" not in death.last_words:
                    tally.fault(part.name, f"ended by itself with {death.code}: {death.last_words}")
        with self._cluster.store() as store:
            if tally.losses:
                # Results whose acknowledgement was lost expire.
                with suppress(AssertionError):
                    wait_until(
                        lambda: not checks.remaining_keys(store), "results expire", 2 * RESULT_TTL
                    )
            tally.balance(store)
        return tally
