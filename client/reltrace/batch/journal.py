"""What of a batch is done: one line per commit, the only thing that says so.

A file of traces counts once a line names it; a line counts once its end of line is there. So a
crash leaves at most a file that nobody names, or a line without an end, and the next run removes
both.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reltrace.storage.atomic_files import append_durably, cut
from reltrace.types.errors import InvalidArgument, TraceError, invalid

NAME = "journal.jsonl"
# Of a failed prompt, besides its texts.
_FAILED_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Failed:
    """A prompt that gave no trace.

    Attributes
    ----------
    index, line : int
        Its place among the prompts, from 0, and in the file, from 1.
    id : str or int
        What the file calls it, else `index`.
    error : str
        Name of the error's class, such as "InvalidArgument".
    message : str
        What it says.
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
    def final(self) -> bool:
        """Whether the prompt itself is wrong: another try would end the same way."""
        return self.error == InvalidArgument.__name__

    @property
    def bytes(self) -> int:
        """About what is held of it."""
        texts = [str(self.id), self.message]
        for violation in self.violations:
            texts += violation.values()
        return _FAILED_BYTES + sum(map(len, texts))

    @classmethod
    def of(cls, index: int, line: int, name: str | int, error: TraceError) -> Failed:
        """Describe an error."""
        violations = [
            {"field": violation.field, "description": violation.description}
            for violation in error.violations
        ]
        kind = InvalidArgument if isinstance(error, InvalidArgument) else type(error)
        return cls(index, line, name, kind.__name__, str(error), violations)


@dataclass(frozen=True, slots=True)
class Commit:
    """One line.

    Attributes
    ----------
    part : str or None
        Name of the file of traces; None if all of these prompts failed.
    done : list of (int, int)
        The prompts whose traces are in it, as ranges of indices, both ends included; in the order
        of the file's rows.
    traces : list of int
        How many traces each of these prompts has; empty: one each.
    failed : list of Failed
        Prompts that failed.
    read : int
        How many prompts of the input had been read, and
    digest : str
        their digest: the input must begin like this when the batch goes on.
    """

    part: str | None
    done: list[tuple[int, int]]
    traces: list[int]
    failed: list[Failed]
    read: int
    digest: str

    def indices(self) -> Iterator[int]:
        """Return the indices of the prompts whose traces are in the file."""
        for first, last in self.done:
            yield from range(first, last + 1)

    def to_line(self) -> bytes:
        """Return the line."""
        return json_line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Commit:
        """Read a line.

        Raises
        ------
        ValueError, KeyError, TypeError
            If it is none.
        """
        row: dict[str, Any] = json.loads(line)
        return cls(
            part=row["part"],
            done=[(first, last) for first, last in row["done"]],
            traces=row["traces"],
            failed=[Failed(**failed) for failed in row["failed"]],
            read=row["read"],
            digest=row["digest"],
        )


def json_line(value: dict[str, Any]) -> bytes:
    """Return a line of JSON.

    A lone surrogate, which a message quotes where an input has one, is no UTF-8: it is escaped as
    JSON does it.
    """
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def ranges(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Return rising indices as ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def _put(states: array[int] | bytearray, index: int, state: int) -> None:
    """Set an element; those that are missing before it become 0."""
    if index >= len(states):
        missing = index + 1 - len(states)
        if isinstance(states, bytearray):
            states.extend(bytes(missing))
        else:
            states.extend([0] * missing)
    states[index] = state


class Journal:
    """The journal of a folder.

    Parameters
    ----------
    folder : Path
        Where it is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def commits(self) -> Iterator[Commit]:
        """Read what was committed, line by line.

        Raises
        ------
        InvalidArgument
            If a line in the middle is damaged, which no crash does.
        """
        for number, line in enumerate(self._lines(), start=1):
            try:
                yield Commit.from_line(line)
            except (ValueError, KeyError, TypeError) as error:
                raise invalid("out", f"{self._path}: line {number} is damaged: {error}") from error

    def _lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def repair(self) -> None:
        """Remove what a crash left of a line."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    whole += len(line)
        if whole < self._path.stat().st_size:
            cut(self._path, whole)

    def failures(self) -> Iterator[Failed]:
        """Read which prompts failed, and were not traced since: the last failure of each.

        In two passes, so that what is held is four bytes per prompt, however many failed.
        """
        last = array("i")
        for number, commit in enumerate(self.commits(), start=1):
            for index in commit.indices():
                _put(last, index, 0)
            for failed in commit.failed:
                _put(last, failed.index, number)
        for number, commit in enumerate(self.commits(), start=1):
            yield from (failed for failed in commit.failed if last[failed.index] == number)

    def append(self, commit: Commit) -> None:
        """Commit."""
        append_durably(self._path, commit.to_line())


class Done:
    """Which prompts of a batch are done; one byte each.

    Later lines win: a prompt that failed may have been tried again.
    """

    _DONE, _FINAL, _FAILED = 1, 2, 3

    def __init__(self) -> None:
        self._states = bytearray()

    def add(self, commit: Commit) -> None:
        """Take the next commit."""
        for index in commit.indices():
            _put(self._states, index, self._DONE)
        for failed in commit.failed:
            _put(self._states, failed.index, self._FINAL if failed.final else self._FAILED)

    def wants(self, index: int, *, retry_failed: bool) -> bool:
        """Return whether a prompt is to be traced.

        Whatever failed for a reason that may pass is tried again, and with `retry_failed`
        everything that failed.
        """
        state = self._states[index] if index < len(self._states) else 0
        return state in (0, self._FAILED) or (retry_failed and state == self._FINAL)

    def failed_before(self, index: int) -> bool:
        """Return whether a prompt failed, and was not traced since."""
        return index < len(self._states) and self._states[index] in (self._FINAL, self._FAILED)

    @property
    def traced(self) -> int:
        """How many prompts have their traces."""
        return self._states.count(self._DONE)

    @property
    def failed(self) -> int:
        """How many prompts failed, and were not traced since."""
        return self._states.count(self._FINAL) + self._states.count(self._FAILED)
