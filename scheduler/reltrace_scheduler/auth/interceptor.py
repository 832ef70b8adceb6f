"""Who may call what: every RPC of ours passes here before anything of it is read."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog

from reltrace_scheduler.auth.identity import Identity, Role, act_as
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import ForbiddenError, UnauthenticatedError

log = structlog.get_logger()

_NEEDS = {
    "reltrace.v1.TraceService": Role.CLIENT,
    "reltrace.v1.WorkerService": Role.WORKER,
    "reltrace.v1.AdminService": Role.OPERATOR,
}

_LONGEST_HEADER = 512
"""Characters; a token of ours has 47."""

_HOW = "set RELTRACE_TOKEN, or RELTRACE_TOKEN_FILE to a file that holds the token"


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Finds the caller by its token, and lets it do what its role allows.

    It raises what `reltrace_scheduler.api.error_interceptor.ErrorInterceptor`, around it, answers.

    Parameters
    ----------
    tokens : Tokens
        The tokens that hold.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Authenticate a call of ours; leave health and reflection open."""
        method = handler_call_details.method
        if not method.startswith("/reltrace."):
            return await continuation(handler_call_details)
        try:
            token = _bearer(handler_call_details.invocation_metadata)
            identity = self._tokens.find(token)
            _check_role(identity, method)
        except (UnauthenticatedError, ForbiddenError) as error:
            log.info("call.refused", method=method, reason=error.message)
            raise
        # gRPC finds the handler in the task that runs it.
        act_as(identity)
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        kind, make = (
            ("stream_stream", grpc.stream_stream_rpc_method_handler)
            if handler.request_streaming
            else ("unary_stream", grpc.unary_stream_rpc_method_handler)
        )
        return make(
            self._while_valid(getattr(handler, kind), token),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _while_valid(self, behaviour: Callable[..., Any], token: str) -> Callable[..., Any]:
        """Cut a stream at the first message after its token was withdrawn."""

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            generation = self._tokens.generation
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    self._tokens.look()
                    if self._tokens.generation != generation:
                        generation = self._tokens.generation
                        self._tokens.find(token)
                    yield response

        return call


def _bearer(metadata: Any) -> str:
    values = [value for key, value in metadata or () if key == "authorization"]
    if not values:
        raise UnauthenticatedError(f"this server asks for a token: {_HOW}")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token or len(token) > _LONGEST_HEADER:
        raise UnauthenticatedError(f"the authorization is not one `Bearer TOKEN`: {_HOW}")
    return token.strip()


def _check_role(identity: Identity, method: str) -> None:
    service, _, name = method.removeprefix("/").partition("/")
    # A service that nobody thought of here is an operator's.
    needed = _NEEDS.get(service, Role.OPERATOR)
    if needed not in identity.roles:
        has = Role.OPERATOR if Role.OPERATOR in identity.roles else min(identity.roles)
        raise ForbiddenError(
            f"{name} needs a token of the role {needed}, and {identity.name!r} has the role {has}: "
            "ask the operator for one"
        )
