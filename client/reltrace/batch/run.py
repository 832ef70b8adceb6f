"""`reltrace batch`: the prompts of a file through the service, each once."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from reltrace.batch import parts
from reltrace.batch.folder import Folder, Settings
from reltrace.batch.item_options import check_own
from reltrace.batch.items import Fingerprint, InputFormat, Item, read_items
from reltrace.batch.journal import Done, Failed, Journal
from reltrace.batch.writer import Traced, Writer, write_errors
from reltrace.client.recording import recording
from reltrace.client.sync_client import Client
from reltrace.types.errors import InvalidArgument, invalid
from reltrace.types.failure import Failure
from reltrace.types.trace import Trace

_SPOOL_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """How a batch is run; none of it decides a number.

    Attributes
    ----------
    source : Path or None
        The file of prompts; None: standard input.
    out : Path
        The folder of the batch.
    limit : int or None
        Only so many prompts of the file, from its beginning.
    shard : (int, int)
        Which part of the prompts, from 1, and of how many.
    retry_failed : bool
        Try prompts again that failed for a fault of their own.
    max_in_flight : int
        Prompts on their way at a time.
    part_traces : int
        Traces in one file.
    part_seconds : float
        That a trace may wait for its commit.
    """

    source: Path | None
    out: Path
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    retry_failed: bool = False
    max_in_flight: int = 1024
    part_traces: int = 1024
    part_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended.

    Attributes
    ----------
    traced, failed : int
        Prompts of the batch that have their traces, and that failed, in this run or before.
    new : int
        Those that this run ended, one way or the other.
    seconds : float
        That it took.
    """

    traced: int
    failed: int
    new: int
    seconds: float


class Watcher(Protocol):
    """Is told how a run goes."""

    def begin(self, done: int) -> None:
        """Take how many prompts are done already."""

    def result(self, failed: bool) -> None:
        """Take a further one."""


class Run:
    """One run of a batch.

    Parameters
    ----------
    client : Client
        To the server.
    settings : Settings
        Those of the batch.
    input_format : InputFormat
        How the input is read.
    options : Options
        Those of this run.
    stdin : BinaryIO
        Where the prompts come from if `options.source` is None.
    watcher : Watcher
        Who is told.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        input_format: InputFormat,
        options: Options,
        stdin: BinaryIO,
        watcher: Watcher,
    ) -> None:
        self._client = client
        self._settings = settings
        self._format = input_format
        self._options = options
        self._input = _Stdin(stdin) if options.source is None else _File(options.source)
        self._watcher = watcher
        self._folder = Folder.of(options.out, options.shard)
        self._done = Done()
        self._next_part = 0
        # With the revision, once traces have been made.
        self._model = settings.model
        # Shared by the thread that reads prompts and the one that writes.
        self._lock = threading.Lock()
        self._fingerprint = Fingerprint()
        # Prompts on their way: what the file calls them, where they are in it, and whether they
        # say themselves which model.
        self._named: dict[int, tuple[str | int, int, bool]] = {}
        self._new = 0

    def run(self, target: Any) -> Summary:
        """Trace what is missing.

        Parameters
        ----------
        target
            The `target` argument of prompts that have none of their own.

        Raises
        ------
        InvalidArgument
            If the folder holds another batch, or the input is another one than before.
        TraceError
            If the server can not be reached, or refuses. What came before is committed.
        """
        began = time.monotonic()
        with self._folder.held(), closing(self._input):
            self._folder.enter(self._settings, str(self._options.source or "-"))
            self._recover()
            self._model = self._folder.model(self._client.models(), self._settings.model)
            self._watcher.begin(self._done.traced + self._done.failed)
            writer = Writer(
                self._folder,
                self._settings.format,
                self._next_part,
                self._read_so_far,
                most_traces=self._options.part_traces,
                most_seconds=self._options.part_seconds,
            )
            try:
                with recording(self._client, self._folder.submissions(), self._folder.note):
                    self._trace(writer, target)
            finally:
                writer.close()
            return self._summary(time.monotonic() - began)

    def _recover(self) -> None:
        """Take up what runs before this one committed, and remove what they left."""
        journal = Journal(self._folder.own)
        journal.repair()
        named: set[str] = set()
        read, digest = 0, ""
        for commit in journal.commits():
            self._done.add(commit)
            if commit.part is not None:
                named.add(commit.part)
            if commit.read >= read:
                read, digest = commit.read, commit.digest
        self._folder.clean(named)
        self._next_part = 1 + max((parts.number_of(name) for name in named), default=-1)
        write_errors(self._folder, journal.failures())
        if read:
            self._check_input(read, digest)

    def _check_input(self, count: int, digest: str) -> None:
        """Check that the input begins as it did when `count` prompts of it had been read."""
        found = Fingerprint()
        with self._input.first() as file:
            for item in read_items(file, self._format):
                found.add(item)
                if found.count == count:
                    break
        if found.count < count:
            raise invalid(
                "input", f"has {found.count} prompts; this batch has read {count} of it before"
            )
        if found.digest() != digest:
            raise invalid(
                "input",
                f"differs from what this batch was begun with, within the first {count} prompts; "
                "use another folder",
            )

    def _trace(self, writer: Writer, target: Any) -> None:
        settings = self._settings
        results = self._client.trace_many(
            self._wanted(writer),
            model=self._model,
            add_special_tokens=settings.add_special_tokens,
            sites=settings.sites,
            reduce=settings.reduce,
            target=target,
            rule=settings.rule,
            dtype=settings.dtype,
            layers=settings.layers,
            top_k=settings.top_k,
            output_uri=settings.output_uri,
            max_in_flight=self._options.max_in_flight,
            priority="batch",
        )
        # Closed whatever happens: what is still on the server is cancelled.
        with closing(cast(Generator[Any, None, None], results)):
            for result in results:
                writer.put(self._named_result(result))
                self._new += 1
                self._watcher.result(isinstance(result, Failure))

    def _named_result(self, result: Trace | list[Trace] | Failure) -> Traced | Failed:
        """Give a result the name that the file has for it."""
        index = result[0].id if isinstance(result, list) else result.id
        assert isinstance(index, int)
        with self._lock:
            name, line, own_model = self._named.pop(index)
        if isinstance(result, Failure):
            return Failed.of(index, line, name, result.reason)
        traces = result if isinstance(result, list) else [result]
        return Traced(index, line, tuple(replace(trace, id=name) for trace in traces), own_model)

    def _wanted(self, writer: Writer) -> Iterator[dict[str, Any]]:
        """Read the input; return the prompts that are this machine's and not done."""
        number, count = self._options.shard
        with self._input.second() as file:
            for item in read_items(file, self._format):
                if self._options.limit is not None and item.index >= self._options.limit:
                    return
                with self._lock:
                    self._fingerprint.add(item)
                if item.index % count != number - 1:
                    continue
                if not self._done.wants(item.index, retry_failed=self._options.retry_failed):
                    continue
                fault = item.fault or self._own_fault(item)
                if fault is not None:
                    self._refuse(item, fault, writer)
                    continue
                with self._lock:
                    own_model = "model" in item.arguments
                    self._named[item.index] = (item.id, item.line, own_model)
                yield {**item.arguments, **self._revision(item), "id": item.index}

    def _revision(self, item: Item) -> dict[str, str]:
        """Return the batch's revision for a prompt that names the same model without one."""
        if self._model and item.arguments.get("model") == self._model.partition("@")[0]:
            return {"model": self._model}
        return {}

    def _own_fault(self, item: Item) -> InvalidArgument | None:
        try:
            check_own(item.arguments, self._settings)
        except InvalidArgument as fault:
            return fault
        return None

    def _refuse(self, item: Item, fault: InvalidArgument, writer: Writer) -> None:
        """Note a prompt that is none here; the input is the same, so once is enough."""
        if not self._done.failed_before(item.index):
            writer.put(Failed.of(item.index, item.line, item.id, fault))
            self._new += 1
            self._watcher.result(failed=True)

    def _read_so_far(self) -> tuple[int, str]:
        with self._lock:
            return self._fingerprint.count, self._fingerprint.digest()

    def _summary(self, seconds: float) -> Summary:
        done = Done()
        journal = Journal(self._folder.own)
        for commit in journal.commits():
            done.add(commit)
        write_errors(self._folder, journal.failures())
        return Summary(done.traced, done.failed, self._new, seconds)


class _File:
    """An input that can be read twice."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def first(self) -> BinaryIO:
        try:
            return self._path.open("rb")
        except OSError as error:
            raise invalid("input", f"{self._path}: {error.strerror}") from None

    second = first

    def close(self) -> None:
        """Hold nothing."""


class _Stdin:
    """An input that comes once: what the first reading takes of it is kept for the second."""

    def __init__(self, stdin: BinaryIO) -> None:
        self._stdin = stdin
        # Without a name: nothing is left of it after a crash.
        self._kept: Any = None

    def first(self) -> BinaryIO:
        self._kept = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
        return io.BufferedReader(_Tee(self._stdin, self._kept))

    def second(self) -> BinaryIO:
        if self._kept is None:
            return io.BufferedReader(_Chain([self._stdin]))
        self._kept.seek(0)
        return io.BufferedReader(_Chain([self._kept, self._stdin]))

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


class _Tee(io.RawIOBase):
    """Reads a stream, and writes what it has read to another."""

    def __init__(self, source: Any, copy: Any) -> None:
        self._source, self._copy = source, copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read1(len(buffer))
        self._copy.write(data)
        buffer[: len(data)] = data
        return len(data)


class _Chain(io.RawIOBase):
    """Reads streams one after another."""

    def __init__(self, sources: list[Any]) -> None:
        self._sources = sources

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._sources:
            read = getattr(self._sources[0], "read1", self._sources[0].read)
            if data := read(len(buffer)):
                buffer[: len(data)] = data
                return len(data)
            self._sources.pop(0)
        return 0
