"""The one place where errors become gRPC statuses, and bytes become requests."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from redis.exceptions import BusyLoadingError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from reltrace_scheduler.api.utf8 import undecodable_field
from reltrace_scheduler.config import MAX_REQUEST_BYTES
from reltrace_scheduler.errors import (
    InvalidRequestError,
    SchedulerError,
    UnavailableError,
    Violation,
)

log = structlog.get_logger()

_REDIS_AWAY = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,
)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Gives every failure of a handler a status that says what to do.

    Requests are parsed here too: gRPC answers a request that can not be parsed with a
    bare INTERNAL, which tells the caller nothing.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap a handler of ours; leave gRPC's own services as they are."""
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except SchedulerError as error:
            return _refusal(error, method)
        if handler is None or not method.startswith("/reltrace."):
            return handler
        parse = _parser(handler.request_deserializer, limited="WorkerService" not in method)
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        name = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        return HANDLERS[name](
            wrap(getattr(handler, name), handler.request_streaming, method),
            request_deserializer=parse,
            response_serializer=handler.response_serializer,
        )


HANDLERS: dict[str, Callable[..., Any]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _refusal(error: SchedulerError, method: str) -> Any:
    """Return a handler that answers with an error before it reads the request."""

    async def call(
        requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        await _abort(context, error, method)
        yield b""  # Never reached; it makes this a handler of streams.

    # On the wire a stream is any method's shape, and only a stream is not read by gRPC itself.
    return grpc.stream_stream_rpc_method_handler(call)


def _parser(
    parse: Callable[[bytes], Message], *, limited: bool
) -> Callable[[bytes], Message | InvalidRequestError]:
    # Stubs give the bound `FromString` of the message class.
    descriptor: Any = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined]

    def parse_or_say_why(data: bytes) -> Message | InvalidRequestError:
        if limited and len(data) > MAX_REQUEST_BYTES:
            return InvalidRequestError(
                Violation(
                    "request",
                    f"is {len(data)} bytes long; at most {MAX_REQUEST_BYTES} are allowed: "
                    "send fewer jobs in one message",
                )
            )
        try:
            return parse(data)
        except DecodeError:
            field = undecodable_field(descriptor, data)
            return InvalidRequestError(
                Violation(field, "is not valid UTF-8")
                if field
                else Violation("request", f"is not a valid {descriptor.full_name} message")
            )

    return parse_or_say_why


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidRequestError):
        raise request
    return request


async def _checked_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _wrap_unary(behaviour: Callable[..., Any], streaming: bool, method: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(
                _checked_each(request) if streaming else _checked(request), context
            )
        except Exception as error:
            await _abort(context, error, method)

    return call


def _wrap_stream(behaviour: Callable[..., Any], streaming: bool, method: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async for response in behaviour(
                _checked_each(request) if streaming else _checked(request), context
            ):
                yield response
        except Exception as error:
            await _abort(context, error, method)

    return call


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, _REDIS_AWAY):
        log.warning("redis.away", method=method, error=str(error))
        error = UnavailableError("the job store can not be reached at present; try again")
    elif not isinstance(error, SchedulerError):
        # A fault of ours: the caller learns that, the log learns what.
        log.exception("rpc.failed", method=method)
        error = SchedulerError("internal error in the scheduler; its log says more")
    details = _details(error)
    await context.abort(
        error.code,
        details.message,
        trailing_metadata=(("grpc-status-details-bin", details.SerializeToString()),),
    )


# gRPC drops a status of more than 16 KiB, and by chance one of more than 8 KiB, and says that the
# server had no room. The message is in it twice, once with three bytes for each that is not ASCII.
_MOST_MESSAGE, _MOST_DESCRIPTION, _MOST_DETAILS = 640, 1024, 4096


def _details(error: SchedulerError) -> Status:
    """Return what is said of an error; of very many faults the first ones, and how many there are.

    Who mends those, or leaves those jobs out, is told of the next.
    """
    status = Status(code=error.code.value[0], message=_cut(error.message, _MOST_MESSAGE))
    if error.violations:
        bad, room = BadRequest(), _MOST_DETAILS
        for violation in error.violations:
            description = _cut(violation.description, _MOST_DESCRIPTION)
            room -= len(violation.field.encode()) + len(description.encode()) + 8
            if room < 0 and bad.field_violations:
                break
            bad.field_violations.add(
                field=_cut(violation.field, _MOST_MESSAGE), description=description
            )
        if left := len(error.violations) - len(bad.field_violations):
            more = f"; and {left} faults more"
            status.message = _cut(error.message, _MOST_MESSAGE - len(more)) + more
        _pack(status, bad)
    if error.retry_after is not None:
        seconds, nanos = divmod(round(error.retry_after * 1e9), 1_000_000_000)
        _pack(status, RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos)))
    return status


def _cut(text: str, most: int) -> str:
    """Return a text of at most so many bytes, with its beginning."""
    data = text.encode()
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def _pack(status: Status, detail: Message) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
