"""The journal of a batch: a SQLite file of which prompts are done, and where their traces are.

A file of traces counts once a transaction names it. A crash leaves at most a file that none names,
which the next run removes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.batch.items import Item
from reltrace.types.arrays import Array
from reltrace.types.errors import InvalidArgument, TraceError, invalid

NAME = "journal.sqlite"

# States of a prompt. It is refused if it failed because it is invalid: a retry would fail again.
TRACED, FAILED, REFUSED = 1, 2, 3

_SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (
    number INTEGER PRIMARY KEY, -- in the input, from 0
    state INTEGER NOT NULL,
    part INTEGER,               -- number of the file of its traces
    row INTEGER,                -- of its first trace in that file
    traces INTEGER,             -- how many it has
    failure TEXT                -- JSON of `Failed`
);
CREATE TABLE IF NOT EXISTS input (
    prompts INTEGER PRIMARY KEY, -- how many had been read at a commit
    digest TEXT NOT NULL
);
"""

# Seconds to wait for another process that reads.
_TIMEOUT = 60.0
# Memory of a failure, besides its text.
_FAILURE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Failed:
    """A prompt that has no trace.

    Attributes
    ----------
    index, line : int
        Its number among the prompts, from 0, and in the file, from 1.
    id : str or int
        As the file names it, else `index`.
    error : str
        Name of the error's class, such as "InvalidArgument".
    message : str
        Its message.
    violations : list of dict
        The faults of the prompt, each with "field" and "description".
    """

    index: int
    line: int
    id: str | int
    error: str
    message: str
    violations: list[dict[str, str]] = field(default_factory=list)

    @property
    def state(self) -> int:
        """`REFUSED` or `FAILED`."""
        return REFUSED if self.error == InvalidArgument.__name__ else FAILED

    @property
    def size(self) -> int:
        return _FAILURE_BYTES + len(self.to_line())

    @classmethod
    def of(cls, item: Item, error: TraceError) -> Failed:
        violations = [asdict(violation) for violation in error.violations]
        kind = InvalidArgument if isinstance(error, InvalidArgument) else type(error)
        return cls(item.index, item.line, item.id, kind.__name__, str(error), violations)

    def to_line(self) -> bytes:
        text = json.dumps(asdict(self), ensure_ascii=False)
        # A message may quote a lone surrogate of the input, which UTF-8 can not encode.
        return text.encode(errors="backslashreplace") + b"\n"


class Journal:
    """The journal of a folder; created if it is missing.

    Raises
    ------
    InvalidArgument
        From all methods: if the file is damaged.
    OSError
        From all methods: if it can not be read or written, such as on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        with self._described_errors():
            # Threads use it one after the other.
            self._database = sqlite3.connect(self._path, timeout=_TIMEOUT, check_same_thread=False)
            # A commit outlives a power failure at once.
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def commit(
        self,
        part: int | None,
        traced: Sequence[tuple[int, int]],
        failed: Sequence[Failed],
        prompts_read: int,
        digest: str,
    ) -> None:
        """Record results durably, all or none; a later result of a prompt replaces an earlier one.

        `part` is the number of the file of traces, `traced` the number and count of traces of each
        prompt in it, in its order.
        """
        rows: list[tuple[Any, ...]] = []
        first = 0
        for number, count in traced:
            rows.append((number, TRACED, part, first, count, None))
            first += count
        for one in failed:
            failure = json.dumps(asdict(one))
            rows.append((one.index, one.state, None, None, None, failure))
        with self._described_errors(), self._database:
            self._database.executemany("REPLACE INTO prompts VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._database.execute("REPLACE INTO input VALUES (?, ?)", (prompts_read, digest))

    def states(self) -> bytearray:
        """Return the state of each prompt, by its number; 0: it has no result."""
        found = self._table("SELECT number, state FROM prompts", number="i8", state="u1")
        states = np.zeros(1 + found["number"].max(initial=-1), np.uint8)
        states[found["number"]] = found["state"]
        return bytearray(states)

    def traces(self) -> Array:
        """Return, for each traced prompt, "number", "part", "row" of the first trace, "traces"."""
        return self._table(
            f"SELECT number, part, row, traces FROM prompts WHERE state = {TRACED} ORDER BY number",
            number="i8", part="i4", row="i4", traces="i4",
        )  # fmt: skip

    def parts(self) -> set[int]:
        """Return the numbers of the files that hold traces."""
        query = "SELECT DISTINCT part FROM prompts WHERE part IS NOT NULL"
        return {part for (part,) in self._rows(query)}

    def failures(self) -> Iterator[Failed]:
        """Yield the prompts that failed, in their order."""
        query = "SELECT failure FROM prompts WHERE failure IS NOT NULL ORDER BY number"
        with self._described_errors():
            for (failure,) in self._database.execute(query):
                try:
                    failed = Failed(**json.loads(failure))
                except (TypeError, ValueError, RecursionError) as error:
                    raise self._damaged(error) from error
                yield failed

    def input(self) -> tuple[int, str]:
        """Return how many prompts of the input have been read at most, and their digest."""
        query = "SELECT prompts, digest FROM input ORDER BY prompts DESC LIMIT 1"
        return next(iter(self._rows(query)), (0, ""))

    def _rows(self, query: str) -> list[Any]:
        with self._described_errors():
            return self._database.execute(query).fetchall()

    def _table(self, query: str, **columns: str) -> Array:
        with self._described_errors():
            try:
                return np.fromiter(self._database.execute(query), list(columns.items()))
            except (TypeError, ValueError, OverflowError) as error:
                raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InvalidArgument:
        return invalid("out", f"{self._path} is damaged: {error}")

    @contextmanager
    def _described_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{error}: {str(self._path)!r}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
