"""Which revision of a model a run asks for: the one that it began with, to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import grpc
from reltrace_proto.v1 import trace_pb2

from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.types import server_info as info
from reltrace.types.errors import ModelNotFound, RpcStatus, invalid

log = logging.getLogger("reltrace")

_LOOK_AGAIN = 5.0
"""Seconds between looks at what is served, for a revision that has gone."""


def route_of(model: info.Model) -> str:
    """Return the name by which a job asks for exactly this revision."""
    return f"{model.name}@{model.revision}" if model.revision else model.name


def named(models: Sequence[info.Model], name: str) -> list[info.Model]:
    """Return the models that a name may mean, of which a server takes a single one.

    Parameters
    ----------
    models : sequence of Model
        What the server lists.
    name : str
        NAME, NAME@REVISION, or "" for the only one.
    """
    if not name:
        return [model for model in models if model.workers] or list(models)
    return [model for model in models if name in (model.name, route_of(model))]


def only(models: Sequence[info.Model], name: str) -> info.Model | None:
    """Return the model that a name means; None: that is for the server to say.

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
    """The revisions that a run asks for. Upgrades while it runs change nothing in it.

    Parameters
    ----------
    connection : Connection
        To the servers.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._routes: dict[str, str] = {}

    async def route(self, name: str, deadline: Deadline) -> str:
        """Return what jobs for a model ask for: NAME@REVISION, from the first call on the same.

        A name that the server does not list is returned as it is: the server says what is wrong.

        Parameters
        ----------
        name : str
            As on the wire: "" for the only model.
        deadline : Deadline
            For a server without any worker so far.

        Raises
        ------
        InvalidArgument
            If several revisions of the model are served.
        TraceError
            If the server can not be reached.
        """
        if name not in self._routes:
            model = only(await self._known(deadline), name)
            if model is None:
                return name
            route = route_of(model)
            if name != route:
                # Another call, or the only model's own name, may have been first.
                route = self._routes.setdefault(model.name, route)
            self._routes[name] = route
        return self._routes[name]

    async def _known(self, deadline: Deadline) -> list[info.Model]:
        """Return the models that the server knows; waits for its first worker."""
        retries = self._connection.retries(deadline)
        while not (models := await self._listed(deadline)):
            message = "no worker has connected yet, so no model is served"
            await retries.after(RpcStatus(grpc.StatusCode.UNAVAILABLE, message))
        retries.succeeded()
        return models

    async def _listed(self, deadline: Deadline) -> list[info.Model]:
        answer = await self._connection.call(
            lambda server: server.traces.ListModels, trace_pb2.ListModelsRequest(), deadline
        )
        return info.models(answer)

    async def watch(self) -> None:
        """Look at times whether the revisions are served still; never returns.

        While no revision of a model is served, its jobs wait for a worker: it may be starting.

        Raises
        ------
        ModelNotFound
            If one is gone, while another one of the model is served, for the client's
            `retry_timeout`.
        """
        gone: dict[str, float] = {}
        while True:
            await asyncio.sleep(_LOOK_AGAIN)
            if not self._routes:
                continue
            models = [m for m in await self._listed(Deadline(None)) if m.workers]
            now, patience = time.monotonic(), self._connection.retry_timeout
            for route in set(self._routes.values()):
                others = [m for m in models if m.name == route.partition("@")[0]]
                if not others or any(route_of(model) == route for model in others):
                    gone.pop(route, None)
                    continue
                message = (
                    f"model: this run asks for {route}, which no worker serves any more; "
                    f"served: {', '.join(map(route_of, others))}"
                )
                if route not in gone:
                    gone[route] = now
                    log.warning("%s; waiting %.0f s for it", message, patience)
                elif now - gone[route] >= patience:
                    raise ModelNotFound(message)
