"""The models that are known, read from Redis at most once a second."""

import time

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.store.registry import Registry

_FRESH = 1.0
"""Seconds."""


class Models:
    """A short-lived copy of the registry's models, for checking submissions."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, types_pb2.ModelInfo] = {}
        self._read_at = float("-inf")

    async def get(self, *names: str) -> dict[str, types_pb2.ModelInfo]:
        """Return all known models by name.

        Read again when the copy is old, or lacks one of `names`: a worker that has just
        announced its model must not be told that it does not exist.
        """
        age = time.monotonic() - self._read_at
        if age > _FRESH or not self._known or any(n and n not in self._known for n in names):
            known = await self._registry.models()
            self._known = {
                name: types_pb2.ModelInfo.FromString(info) for name, info in sorted(known.items())
            }
            self._read_at = time.monotonic()
        return self._known
