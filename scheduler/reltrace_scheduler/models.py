"""The models that are known, read from Redis at most once a second."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.store.registry import Registry

_FRESH = 1.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Models:
    """What is known of models at one moment."""

    known: Mapping[str, types_pb2.ModelInfo] = field(default_factory=dict)
    """Every model that was ever served, by name: jobs for it wait for its next worker."""

    workers: Mapping[str, int] = field(default_factory=dict)
    """How many workers have it loaded at present; models without one are left out."""

    @property
    def default(self) -> str | None:
        """The model of a job that names none: the only one that is served, or known."""
        names = self.workers or self.known
        return next(iter(names)) if len(names) == 1 else None


class ModelCache:
    """A short-lived copy of the registry, for checking submissions.

    Parameters
    ----------
    lease : float
        Seconds after which a silent worker does not count any more.
    """

    def __init__(self, registry: Registry, lease: float) -> None:
        self._registry = registry
        self._lease = lease
        self._models = Models()
        self._read_at = float("-inf")

    async def get(self, *names: str) -> Models:
        """Return what is known.

        Read again when the copy is old, or lacks one of `names`: a worker that has just
        announced its model must not be told that it does not exist.
        """
        age = time.monotonic() - self._read_at
        known = self._models.known
        if age > _FRESH or not known or any(name and name not in known for name in names):
            self._models = await self._read()
            self._read_at = time.monotonic()
        return self._models

    async def _read(self) -> Models:
        infos = await self._registry.models()
        workers: dict[str, int] = {}
        for worker in await self._registry.workers(seen_since=time.time() - self._lease):
            workers[worker.model] = workers.get(worker.model, 0) + 1
        return Models(
            {name: types_pb2.ModelInfo.FromString(info) for name, info in sorted(infos.items())},
            workers,
        )
