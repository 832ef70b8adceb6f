"""Measures calls: how long unary ones take, and how all of them end."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from reltrace_scheduler.api.error_interceptor import HANDLERS
from reltrace_scheduler.observability.counters import Counts


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """The outermost interceptor: what it sees is what the caller gets."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap a handler of ours; leave gRPC's own services as they are."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/reltrace."):
            return handler
        wrap = self._stream if handler.response_streaming else self._unary
        name = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        return HANDLERS[name](
            wrap(getattr(handler, name), method.rpartition("/")[2]),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began = time.perf_counter()
            try:
                return await behaviour(request, context)
            finally:
                seconds = time.perf_counter() - began
                self._counts.calls.labels(method, _code(context)).observe(seconds)

        return call

    def _stream(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                async for response in behaviour(request, context):
                    yield response
            finally:
                self._counts.streams.labels(method, _code(context)).inc()

        return call


def _code(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return the status of a call that is over; nothing was set where it went well."""
    if context.cancelled():
        return grpc.StatusCode.CANCELLED.name
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), "OK")
