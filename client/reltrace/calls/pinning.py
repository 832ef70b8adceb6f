"""Pins a run to the revision of a model with which it began."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import grpc
from reltrace_proto.v1 import trace_pb2

from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.transport.status import RpcStatus
from reltrace.types import server_info as info
from reltrace.types.errors import ModelNotFound, invalid

log = logging.getLogger("reltrace")

# Seconds between checks of what is served.
_CHECK_INTERVAL = 5.0


def route_of(model: info.Model) -> str:
    """Return the name by which a job asks for exactly this revision."""
    return f"{model.name}@{model.revision}" if model.revision else model.name


def named(models: Sequence[info.Model], name: str) -> list[info.Model]:
    """Return the models that a name may mean: NAME, NAME@REVISION, or "" for the only model."""
    if not name:
        return [model for model in models if model.workers] or list(models)
    return [model for model in models if name in (model.name, route_of(model))]


def only(models: Sequence[info.Model], name: str) -> info.Model | None:
    """Return the model that a name means, or None if the server has to reject the name.

    Raises
    ------
    InvalidArgument
        If several revisions of the model are served.
    """
    found = named(models, name)
    if len({model.name for model in found}) != 1:
        return None
    if len(found) > 1:
        raise invalid(
            "model",
            f"{found[0].name!r} is served in {len(found)} revisions; ask for one of them as "
            f"NAME@REVISION: {', '.join(map(route_of, found))}",
        )
    return found[0]


class Pins:
    """The revisions that a run asks for, which an upgrade of the workers does not change."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._routes: dict[str, str] = {}

    async def route(self, name: str, deadline: Deadline) -> str:
        """Return NAME@REVISION for a name as on the wire, the same in every call.

        A name that the server does not list is returned as it is. If no worker has connected to
        the server so far, the first one is waited for.
        """
        if name not in self._routes:
            model = only(await self._wait_for_models(deadline), name)
            if model is None:
                return name
            route = route_of(model)
            if name != route:
                # Another call, or another name of this model, may have pinned it.
                route = self._routes.setdefault(model.name, route)
            self._routes[name] = route
        return self._routes[name]

    async def _wait_for_models(self, deadline: Deadline) -> list[info.Model]:
        retries = self._connection.retries(deadline)
        while not (models := await self._models(deadline)):
            message = "no worker has connected yet, so no model is served"
            await retries.after(RpcStatus(grpc.StatusCode.UNAVAILABLE, message))
        retries.succeeded()
        return models

    async def _models(self, deadline: Deadline) -> list[info.Model]:
        answer = await self._connection.call(
            lambda server: server.traces.ListModels, trace_pb2.ListModelsRequest(), deadline
        )
        return info.models(answer)

    async def watch(self) -> None:
        """Check at intervals that the revisions are still served; never returns.

        Raises `ModelNotFound` if one has not been served for the client's `retry_timeout` while
        another revision of its model is. If none is, jobs wait for a worker that may be starting.
        """
        gone_since: dict[str, float] = {}
        while True:
            await asyncio.sleep(_CHECK_INTERVAL)
            if not self._routes:
                continue
            models = [m for m in await self._models(Deadline(None)) if m.workers]
            now, patience = time.monotonic(), self._connection.retry_timeout
            for route in set(self._routes.values()):
                revisions = [m for m in models if m.name == route.partition("@")[0]]
                if not revisions or any(route_of(model) == route for model in revisions):
                    gone_since.pop(route, None)
                    continue
                message = (
                    f"model: this run asks for {route}, which no worker serves any more; "
                    f"served: {', '.join(map(route_of, revisions))}"
                )
                if route not in gone_since:
                    gone_since[route] = now
                    log.warning("%s; waiting %.0f s for it", message, patience)
                elif now - gone_since[route] >= patience:
                    raise ModelNotFound(message)
