"""Large results in a store named by a URL, which workers write and clients read.

The scheduler says where, and deletes what belongs to a job that is gone.
"""

import asyncio
import contextlib
import posixpath
import re
import time
from collections.abc import Sequence
from typing import Any

import structlog
from fsspec.core import url_to_fs
from reltrace_proto.stores import TENANT, folders_of, is_below, url_fault

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.store import Store

log = structlog.get_logger()

_PERIOD = 60.0
_MIN_AGE = 60.0
"""Seconds: a younger file may belong to a result that is on its way."""

_BATCH = 500
_NAME = re.compile(r"(?P<job>[\w.]+-\d+)\.\d+\.safetensors")


def check_url(option: str, url: str) -> None:
    """Raise StartError if the folder that an option names is no URL of a known store."""
    if fault := url_fault(url):
        raise StartError(f"{option} {url}: {fault}")
    try:
        url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StartError(f"{option} {url}: {error}") from error


def shared_folders(patterns: Sequence[str]) -> list[str]:
    """Return those that are all tenants'."""
    return [pattern for pattern in patterns if TENANT not in pattern]


def may_hold_results(url: str, results_url: str, patterns: Sequence[str], tenant: str) -> bool:
    """Tell whether a worker may have written a tenant's tensors there; tenant "": not known."""
    if results_url and is_below(url, [results_url]):
        return True
    if tenant:
        return is_below(url, folders_of(patterns, tenant))
    whole = (pattern.partition(TENANT) for pattern in patterns)
    return is_below(url, [head.rpartition("/")[0] if mark else head for head, mark, _ in whole])


class Sweeper:
    """Deletes large results whose job is gone: read and acknowledged, expired, or run again.

    It runs in every scheduler; what one of them has deleted the others do not find.
    """

    def __init__(self, url: str, store: Store) -> None:
        self._url = url
        self._store = store

    async def run(self) -> None:
        while True:
            try:
                if deleted := await self.sweep():
                    log.info("results.swept", files=deleted)
            except Exception as error:
                # Every kind of store has errors of its own; none of them may end this task.
                log.warning("sweeper.failed", url=self._url, error=str(error))
            await asyncio.sleep(_PERIOD)

    async def sweep(self) -> int:
        """Look through the folder once; return how many files were deleted."""
        jobs = await asyncio.to_thread(self._old_files)
        names, deleted = list(jobs), 0
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            known = await self._store.queue.exist([jobs[name] for name in batch])
            gone = [name for name, exists in zip(batch, known, strict=True) if not exists]
            if gone:
                await asyncio.to_thread(self._delete, gone)
                deleted += len(gone)
        return deleted

    def _old_files(self) -> dict[str, str]:
        """Return the job of each file that is old enough, by the file's name."""
        fs, path = url_to_fs(self._url)
        try:
            fs.invalidate_cache(path)
            entries: list[dict[str, Any]] = fs.ls(path, detail=True)
        except FileNotFoundError:
            # No result has been large yet.
            return {}
        before = time.time() - _MIN_AGE
        matches = ((_NAME.fullmatch(posixpath.basename(e["name"])), e) for e in entries)
        return {m[0]: m["job"] for m, entry in matches if m and _written_at(entry) < before}

    def _delete(self, names: list[str]) -> None:
        fs, path = url_to_fs(self._url)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(posixpath.join(path, name))


def _written_at(entry: dict[str, Any]) -> float:
    """Return when a file was written, as far as its store says; 0: long ago."""
    for field in ("mtime", "created", "LastModified", "last_modified"):
        when: Any = entry.get(field)
        if isinstance(when, float | int):
            return float(when)
        if hasattr(when, "timestamp"):
            return float(when.timestamp())
    return 0.0
