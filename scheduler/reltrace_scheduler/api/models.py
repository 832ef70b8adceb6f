"""The models that are known, read from Redis at most once a second."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.queue.registry import Registry

_MAX_AGE = 1.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models that are known at one moment.

    A route is a model's name, which stands for the revision that came last, or NAME@REVISION.
    """

    known: Mapping[str, types_pb2.ModelInfo] = field(default_factory=dict)
    """Models that are or were served, by route: jobs for them wait for the next worker."""
    workers: Mapping[str, int] = field(default_factory=dict)
    """How many workers have it loaded at present; routes without one are left out."""

    @property
    def names(self) -> list[str]:
        """Known routes that name no revision."""
        return _names(self.known)

    @property
    def served(self) -> list[str]:
        """Those that have a worker, or all if none has."""
        return _names(self.workers) or self.names

    @property
    def default(self) -> str | None:
        """The model of a job that names none: the only one that is served, or known."""
        return self.served[0] if len(self.served) == 1 else None

    def revisions(self, name: str) -> list[str]:
        """Return the routes of those revisions of a model that are served."""
        return [route for route in self.workers if route.startswith(f"{name}@")]

    def info(self, route: str) -> types_pb2.ModelInfo:
        """Return a model; for a name, its only served revision, or the one that came last."""
        revisions = self.revisions(route)
        return self.known[revisions[0] if len(revisions) == 1 else route]


def _names(routes: Iterable[str]) -> list[str]:
    return [route for route in routes if "@" not in route]


class ModelCache:
    """A copy of the registry's models that is at most a second old."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._models = Models()
        self._read_at = float("-inf")
        # Many calls may come at once: one reads, the others wait for what it finds.
        self._reading = asyncio.Lock()

    async def get(self, *routes: str) -> Models:
        """Return the models, read again when the copy is old or lacks one of `routes`.

        So that jobs for a model are accepted as soon as its worker has announced it.
        """
        asked_at = time.monotonic()
        if not self._is_fresh(routes):
            async with self._reading:
                # Another call may have read since this one came.
                if self._read_at < asked_at and not self._is_fresh(routes):
                    read_at = time.monotonic()
                    self._models = await self._read()
                    self._read_at = read_at
        return self._models

    async def unserved(self, routes: set[str]) -> list[str]:
        """Return those routes that no worker serves at this moment."""
        # A copy that is a second old may not know the worker that has just come.
        missing = sorted(routes - self._models.workers.keys())
        if not missing:
            return []
        served = await self._registry.serving(missing)
        return [route for route in missing if route not in served]

    def _is_fresh(self, routes: tuple[str, ...]) -> bool:
        known = self._models.known
        young = time.monotonic() - self._read_at <= _MAX_AGE
        return young and bool(known) and all(not route or route in known for route in routes)

    async def _read(self) -> Models:
        infos = await self._registry.models()
        return Models(
            {route: types_pb2.ModelInfo.FromString(info) for route, info in sorted(infos.items())},
            await self._registry.serving(sorted(infos)),
        )
