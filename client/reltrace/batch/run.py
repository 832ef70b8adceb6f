"""`reltrace batch`: traces the prompts of a file, each once."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from reltrace.batch import parts
from reltrace.batch.folder import BatchFolder, Settings
from reltrace.batch.items import Fingerprint, InputFormat, Item, read_items
from reltrace.batch.journal import FAILED, REFUSED, TRACED, Failed, Journal
from reltrace.batch.preflight import find_fault
from reltrace.batch.writer import Traced, Writer, write_errors
from reltrace.calls.progress import Progress
from reltrace.client.recording import recording
from reltrace.client.sync_client import Client
from reltrace.storage.atomic_files import with_filename
from reltrace.types.errors import Failure, TraceError, invalid

# Standard input is copied to this file of the folder: it is read twice.
_STDIN = "stdin"

# The settings that are arguments of `trace`.
_TRACE_ARGUMENTS = (
    "model", "sites", "reduce", "target", "rule", "dtype", "layers", "top_k", "output_uri",
    "add_special_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """Options that do not change the numbers of a batch."""

    source: Path | None  # None: standard input
    out: Path
    limit: int | None = None  # read only the first prompts
    shard: tuple[int, int] = (1, 1)  # number, from 1, and count of machines
    retry_failed: bool = False  # also prompts that failed because they are invalid
    max_in_flight: int = 1024
    part_traces: int = 1024  # traces in one file
    part_seconds: float = 10.0  # that a trace may wait for its commit


@dataclass(frozen=True, slots=True)
class Summary:
    traced: int  # prompts that have traces, of this run or an earlier one
    failed: int  # prompts that failed, likewise
    new: int  # results of this run
    seconds: float


class Run:
    """One run of a batch; `stdin` is read if the options name no source."""

    def __init__(
        self,
        client: Client,
        settings: Settings,
        input_format: InputFormat,
        options: Options,
        stdin: BinaryIO,
        progress: Progress,
    ) -> None:
        self._client = client
        self._settings = settings
        self._format = input_format
        self._options = options
        self._stdin = stdin
        self._progress = progress
        self._folder = BatchFolder(options.out, options.shard)
        # The state of each prompt, by earlier runs.
        self._states = bytearray()
        # With the revision, once traces have been made.
        self._model = settings.model
        # Shared by the thread that reads prompts and the one that writes.
        self._lock = threading.Lock()
        self._fingerprint = Fingerprint()
        # Prompts on the server, by their index.
        self._in_flight: dict[int, Item] = {}
        self._new = 0

    def run(self) -> Summary:
        """Trace the prompts that have no result yet.

        Raises
        ------
        InvalidArgument
            If the folder holds another batch, or the input has changed.
        TraceError
            If the server can not be reached, or refuses. The results so far are committed.
        """
        began = time.monotonic()
        options, settings = self._options, self._settings
        with self._folder.lock():
            self._folder.open(settings, str(options.source or "-"))
            with closing(Journal(self._folder.path)) as journal:
                # What earlier runs committed; files that they left unfinished are removed.
                self._states = journal.states()
                names = {parts.name_of(number, settings.format) for number in journal.parts()}
                self._folder.remove_uncommitted(names)
                write_errors(self._folder, journal)
                source = options.source or self._copy_stdin()
                self._check_input(source, *journal.input())
                self._model = self._folder.route(self._client.models(), settings.model)
                self._progress.begin(len(self._states) - self._states.count(0))
                writer = Writer(
                    self._folder,
                    journal,
                    settings.format,
                    self._input_read,
                    max_traces=options.part_traces,
                    max_seconds=options.part_seconds,
                )
                previous = self._folder.submissions()
                try:
                    with recording(self._client, previous, self._folder.record_submissions):
                        self._trace(source, writer)
                finally:
                    writer.close()
                write_errors(self._folder, journal)
                states = journal.states()
        failed = states.count(FAILED) + states.count(REFUSED)
        return Summary(states.count(TRACED), failed, self._new, time.monotonic() - began)

    def _copy_stdin(self) -> Path:
        path = self._folder.path / _STDIN
        with with_filename(path), path.open("wb") as file:
            shutil.copyfileobj(self._stdin, file)
        return path

    def _read(self, source: Path) -> Generator[Item]:
        try:
            file = source.open("rb")
        except OSError as error:
            raise invalid("input", f"{source}: {error.strerror}") from None
        with file:
            yield from read_items(file, self._format)

    def _check_input(self, source: Path, count: int, digest: str) -> None:
        """Check that the input begins as it did when `count` prompts of it had been read."""
        if not count:
            return
        found = Fingerprint()
        with closing(self._read(source)) as items:
            for item in items:
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

    def _trace(self, source: Path, writer: Writer) -> None:
        arguments = {name: getattr(self._settings, name) for name in _TRACE_ARGUMENTS}
        results = self._client.trace_many(
            self._missing(source, writer),
            **{**arguments, "model": self._model},
            max_in_flight=self._options.max_in_flight,
            priority="batch",
        )
        # Closing it cancels what is still on the server.
        with closing(cast(Generator[Any, None, None], results)):
            for result in results:
                index = result[0].id if isinstance(result, list) else result.id
                with self._lock:
                    item = self._in_flight.pop(index)
                if isinstance(result, Failure):
                    if self._is_shared(item, result.reason):
                        raise result.reason
                    writer.put(Failed.of(item, result.reason))
                else:
                    traces = result if isinstance(result, list) else [result]
                    # With the id that the prompt has in the file.
                    writer.put(Traced(item, tuple(replace(one, id=item.id) for one in traces)))
                self._new += 1
                self._progress.count(result)

    def _is_shared(self, item: Item, fault: TraceError) -> bool:
        """Tell whether a fault is of the folder that all prompts share, and not the prompt's own.

        Only the server knows whether the caller may write there.
        """
        fields = {violation.field for violation in fault.violations}
        return "output_uri" in fields and "output_uri" not in item.arguments

    def _missing(self, source: Path, writer: Writer) -> Iterator[dict[str, Any]]:
        """Yield the prompts of this machine's shard that have no result yet, as jobs."""
        number, count = self._options.shard
        for item in self._read(source):
            if self._options.limit is not None and item.index >= self._options.limit:
                return
            with self._lock:
                self._fingerprint.add(item)
            if item.index % count != number - 1:
                continue
            state = self._states[item.index] if item.index < len(self._states) else 0
            if state == TRACED or (state == REFUSED and not self._options.retry_failed):
                continue
            fault = item.fault or find_fault(item.arguments, self._settings)
            if fault is None:
                arguments = {**item.arguments, "id": item.index}
                if self._model and arguments.get("model") == self._model.partition("@")[0]:
                    # It names the batch's model without the revision.
                    arguments["model"] = self._model
                with self._lock:
                    self._in_flight[item.index] = item
                yield arguments
            elif not state:
                # Recorded once: the input does not change.
                writer.put(Failed.of(item, fault))
                self._new += 1
                self._progress.add(1, failed=1)

    def _input_read(self) -> tuple[int, str]:
        with self._lock:
            return self._fingerprint.count, self._fingerprint.digest()
