"""Every call passes here: it is authorized, limited, parsed and measured; errors get a status."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from redis.asyncio import Redis
from reltrace_proto.v1 import admin_pb2, trace_pb2, worker_pb2

from reltrace_scheduler.api.parsing import parse
from reltrace_scheduler.api.status import status_of
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.authorization import Authorizer
from reltrace_scheduler.auth.identity import act_as, current
from reltrace_scheduler.auth.rates import OpenStreams, Pacer, RateLimiter, Turns
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import (
    InvalidRequestError,
    SchedulerError,
    TooManyStreamsError,
    UnauthenticatedError,
    invalid,
)
from reltrace_scheduler.limits import (
    MAX_PUBLIC_STREAMS,
    MAX_READ_AT_A_TIME,
    MAX_STREAMS_OF_CALLER,
    MAX_SUBMISSIONS_AT_A_TIME,
    MAX_SUBMISSIONS_OF_TENANT,
)
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.trouble import answer_to, log_trouble
from reltrace_scheduler.tasks import note_size, off_loop

log = structlog.get_logger()

Behaviour = Callable[[Any, Any], Any]

_HANDLERS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
SERVICES = {
    service.full_name: service
    for file in (trace_pb2, worker_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}
_METHODS: dict[str, str] = {
    f"/{name}/{method.name}": method.name
    for name, service in SERVICES.items()
    for method in service.methods
}
_TOKEN_PERIOD = 2.0
"""Seconds between looks at the token of a silent stream."""

_DEADLINE = 20.0
"""Seconds of a unary call: less than clients wait, and than a cluster with dead nodes is tried."""

_READ_DEADLINE, _PUBLIC_READ_DEADLINE = 60.0, 5.0
"""Seconds for the message of a submission to come, and for that of a call without a token."""
_SUBMIT = "/reltrace.v1.TraceService/SubmitJobs"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our services; of health and reflection it only bounds the streams."""

    def __init__(self, access: Access, redis: Redis, counts: Counts) -> None:
        self._tokens = access.tokens
        self._authorizer = None if access.tokens is None else Authorizer(access.tokens)
        self._limiter = RateLimiter(redis, access.rates)
        # Without tokens all callers are one: nobody to be protected from another.
        self._pacer = None if access.tokens is None else Pacer()
        self._streams = OpenStreams(MAX_STREAMS_OF_CALLER)
        most = MAX_SUBMISSIONS_AT_A_TIME
        self._turns = Turns(most, most)
        self._reading = (
            Turns(most, most)
            if access.tokens is None
            else Turns(MAX_READ_AT_A_TIME, MAX_SUBMISSIONS_OF_TENANT)
        )
        self._public_streams = OpenStreams(MAX_PUBLIC_STREAMS)
        self._counts = counts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Authorize a call before anything of it is read, and wrap its handler."""
        method = handler_call_details.method
        if not method.startswith("/reltrace."):
            return self._bounded(await continuation(handler_call_details))
        token = ""
        try:
            if self._authorizer is not None:
                metadata = handler_call_details.invocation_metadata
                token, identity = self._authorizer.authorize(method, metadata)
                # gRPC finds the handler in the task that runs it.
                act_as(identity)
            if self._pacer is not None:
                await self._pacer.wait(current().name)
            async with asyncio.timeout(_DEADLINE):
                await self._limiter.take(current().name, "requests", 1)
        except Exception as error:
            return self._refusal(error, method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name, make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, name)
        if handler.response_streaming:
            if self._tokens is not None:
                behaviour = _while_valid(behaviour, self._tokens, token)
            call = self._stream(behaviour, method, handler.request_streaming)
        elif method == _SUBMIT:
            return self._submission(behaviour, handler.response_serializer)
        else:
            call = self._unary(behaviour, method)
        return make(
            call,
            request_deserializer=_parser(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _submission(self, behaviour: Behaviour, serializer: Callable[[Any], bytes]) -> Any:
        """Return a handler that reads a submission, which may be large, when it is its turn."""

        async def parse_and_submit(data: bytes, context: Any) -> Any:
            note_size(len(data))
            request: Any = await off_loop(partial(parse, trace_pb2.SubmitJobsRequest, data))
            await self._limiter.take(current().name, "jobs", len(request.jobs))
            return await behaviour(request, context)

        call = self._unary(parse_and_submit, _SUBMIT)

        async def read(_: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            try:
                tenant = current().tenant
                async with self._reading.one_of(tenant):
                    data = await _message(context, _READ_DEADLINE)
                    async with self._turns.one_of(tenant):
                        response = await call(data, context)
                    del data
                    if response is not None:
                        yield response
            except InvalidRequestError as error:
                _fail(context, error, _SUBMIT)

        # As in `_refusal`: of a unary handler, gRPC has read the message before it is called.
        return grpc.stream_stream_rpc_method_handler(read, response_serializer=serializer)

    def _bounded(self, handler: Any) -> Any:
        """Return a handler of health or reflection whose calls and streams are bounded."""
        if handler is None:
            return None
        if not handler.response_streaming:
            return self._read_soon(handler)
        name, make = _HANDLERS[handler.request_streaming, True]
        behaviour: Any = getattr(handler, name)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                with self._public_streams.one_of("everybody"):
                    async for response in behaviour(request, context):
                        yield response
            except TooManyStreamsError as error:
                _fail(context, error, name)

        async def write(request: Any, context: Any) -> None:
            try:
                with self._public_streams.one_of("everybody"):
                    await behaviour(request, context)
            except TooManyStreamsError as error:
                _fail(context, error, name)

        return make(
            generate if inspect.isasyncgenfunction(behaviour) else write,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _read_soon(self, handler: Any) -> Any:
        """Return the handler of a unary call that ends where its message does not come."""

        async def read(_: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            try:
                data = await _message(context, _PUBLIC_READ_DEADLINE)
            except InvalidRequestError as error:
                _fail(context, error, "")
                return
            response = await handler.unary_unary(handler.request_deserializer(data), context)
            if response is not None:
                yield response

        # As in `_refusal`.
        return grpc.stream_stream_rpc_method_handler(
            read, response_serializer=handler.response_serializer
        )

    def _refusal(self, error: Exception, method: str) -> Any:
        """Return a handler that answers with an error before it reads the request."""

        async def refuse(request: Any, context: Any) -> AsyncIterator[bytes]:
            raise error
            yield b""  # Never reached; it makes this a handler of streams.

        # On the wire a stream is any method's shape, and only a stream is not read by gRPC itself.
        return grpc.stream_stream_rpc_method_handler(self._stream(refuse, method, streaming=True))

    def _unary(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(_DEADLINE):
                    return await behaviour(_checked(request), context)
            except Exception as error:
                _fail(context, error, method)
            finally:
                seconds = time.perf_counter() - began
                self._counts.calls.labels(_label(method), _code(context)).observe(seconds)

        return call

    def _stream(self, behaviour: Behaviour, method: str, streaming: bool) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                requests = _checked_each(request) if streaming else _checked(request)
                with self._streams.one_of(current().name):
                    async for response in behaviour(requests, context):
                        yield response
            except Exception as error:
                _fail(context, error, method)
            finally:
                self._counts.streams.labels(_label(method), _code(context)).inc()

        return call


def _while_valid(behaviour: Behaviour, tokens: Tokens, token: str) -> Behaviour:
    """Cut a stream once its token has expired or was withdrawn; a silent one within seconds."""

    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        task = asyncio.current_task()
        assert task is not None
        waiting, cancelled = False, 0

        async def watch() -> None:
            nonlocal cancelled
            while True:
                await asyncio.sleep(_TOKEN_PERIOD)
                try:
                    tokens.find(token)
                except UnauthenticatedError:
                    # Only where it waits for `behaviour`: elsewhere the task is gRPC's. Again, as
                    # redis-py swallows a cancellation that comes while it connects.
                    if waiting:
                        task.cancel()
                        cancelled += 1

        watching = asyncio.create_task(watch())
        try:
            async with aclosing(behaviour(request, context)) as responses:
                while True:
                    waiting = True
                    response = await anext(responses, None)
                    waiting = False
                    if response is None:
                        return
                    tokens.find(token)
                    yield response
        except asyncio.CancelledError:
            for _ in range(cancelled):
                task.uncancel()
            if cancelled:
                tokens.find(token)
            raise
        finally:
            watching.cancel()

    return call


def _parser(parser: Any) -> Callable[[bytes], Message | InvalidRequestError]:
    """Return a parser that gives what is wrong: gRPC's own error is a bare INTERNAL."""
    # Stubs have the bound `FromString` of the message class.
    kind = parser.__self__

    def parse_or_explain(data: bytes) -> Message | InvalidRequestError:
        try:
            return parse(kind, data)
        except InvalidRequestError as error:
            return error

    return parse_or_explain


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidRequestError):
        raise request
    return request


async def _message(context: Any, deadline: float) -> bytes:
    """Return the message of a unary call."""
    try:
        async with asyncio.timeout(deadline):
            # Not by the iterator, which keeps it until the next collection of garbage.
            data = await context.read()
    except TimeoutError:
        raise invalid("request", f"did not come within {deadline:.0f} s") from None
    if not isinstance(data, bytes):
        raise invalid("request", "is missing")
    return data


async def _checked_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _fail(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    """Set the status of a call that ends with an error.

    `context.abort` raises an error that is kept in a cycle with the call's frames: the request in
    them would be freed with the next collection of garbage only.
    """
    if answer := answer_to(error):
        log_trouble("redis.fails", error, method=method)
        error = answer
    elif not isinstance(error, SchedulerError):
        # The caller is not told what went wrong inside; the log says it.
        log.exception("rpc.failed", method=method, exc_info=error)
        error = SchedulerError("internal error in the scheduler; its log says more")
    status = status_of(error)
    context.set_code(error.code)
    context.set_details(status.message)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))


def _label(method: str) -> str:
    # A caller without a token may name any method: each label set is kept for ever.
    return _METHODS.get(method, "unknown")


def _code(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return the status of a call that is over; nothing was set where it went well."""
    if context.cancelled():
        return grpc.StatusCode.CANCELLED.name
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), "OK")
