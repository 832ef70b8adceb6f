"""Parses requests: errors say what is wrong, and no call into protobuf takes long.

Protobuf holds the interpreter until it has parsed all of what it is given: of 16 MiB that consist
of empty jobs, it makes eight million objects first (seconds, gigabytes). Submissions are therefore
parsed piece by piece; other requests of clients are short.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from reltrace_proto.v1 import trace_pb2, worker_pb2

from reltrace_scheduler.errors import invalid
from reltrace_scheduler.limits import (
    MAX_JOBS_PER_REQUEST,
    MAX_REQUEST_BYTES,
    MAX_SUBMISSION_BYTES,
    MAX_TRANSPORT_BYTES,
)

_PIECE = 1 << 19
"""Bytes that protobuf is given at a time: up to 10 ms, whatever is in them."""

_MAX_ELEMENT = 1 << 21
"""Bytes of one chat, edit or target in a list: twice the longest text."""

_MAX_FIELDS = 1 << 18
"""Of one message that is taken apart here; an atlas has 65,536 prompts and as many chats."""

_MAX_BYTES: dict[Any, int] = {
    trace_pb2.SubmitJobsRequest: MAX_SUBMISSION_BYTES,
    worker_pb2.WorkRequest: MAX_TRANSPORT_BYTES,
}


def parse(kind: type[Message], data: bytes) -> Message:
    """Return a message of a kind; raises `InvalidRequestError`."""
    most = _MAX_BYTES.get(kind, MAX_REQUEST_BYTES)
    if len(data) > most:
        raise invalid(
            "request",
            f"is {len(data)} bytes long; at most {most} are allowed: send less in one message",
        )
    try:
        if kind is trace_pb2.SubmitJobsRequest and len(data) > _PIECE:
            return _submission(memoryview(data))
        return kind.FromString(data)
    except DecodeError:
        fault = f"is not a valid {kind.DESCRIPTOR.full_name} message with texts in UTF-8"
        raise invalid("request", fault) from None


def _submission(view: memoryview) -> trace_pb2.SubmitJobsRequest:
    request = trace_pb2.SubmitJobsRequest()
    for number, begin, content, end in _fields(view, "request"):
        if number != request.JOBS_FIELD_NUMBER:
            request.MergeFromString(bytes(view[begin:end]))
        elif len(request.jobs) < MAX_JOBS_PER_REQUEST:
            path = f"jobs[{len(request.jobs)}]"
            _merge(request.jobs.add(), view[content:end], path)
        else:
            raise invalid("jobs", f"has more than the {MAX_JOBS_PER_REQUEST} jobs that are allowed")
    return request


def _merge(message: Message, view: memoryview, path: str) -> None:
    if len(view) <= _PIECE:
        message.MergeFromString(bytes(view))
        return
    # To protobuf, a message in pieces is the message, and so are those inside it.
    merged = 0
    for number, begin, content, end in _fields(view, path):
        field, size = message.DESCRIPTOR.fields_by_number.get(number), end - content
        if field and field.type == FieldDescriptor.TYPE_MESSAGE and size > _PIECE:
            inside, part = f"{path}.{field.name}", getattr(message, field.name)
            # Else it is one of several, or of a map.
            if isinstance(part, Message):
                message.MergeFromString(bytes(view[merged:begin]))
                _merge(part, view[content:end], inside)
                merged = end
            elif size > _MAX_ELEMENT:
                fault = f"one is {size} bytes long; at most {_MAX_ELEMENT} are allowed"
                raise invalid(inside, fault)
        if end - merged > _PIECE:
            message.MergeFromString(bytes(view[merged:end]))
            merged = end
    message.MergeFromString(bytes(view[merged:]))


def _fields(view: memoryview, path: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, where it and where its content begins, and where it ends."""
    position = count = 0
    while position < len(view):
        begin = position
        if (count := count + 1) > _MAX_FIELDS:
            raise invalid(path, f"has more than {_MAX_FIELDS} parts")
        tag, position = _varint(view, position)
        content = position
        match tag & 7:
            case 0:  # A varint.
                _, position = _varint(view, position)
            case 1:  # 64 bits.
                position += 8
            case 2:  # Text, bytes, a message, or packed numbers.
                size, content = _varint(view, position)
                position = content + size
            case 5:  # 32 bits.
                position += 4
            case _:
                # Groups, which are in none of our messages.
                raise DecodeError("unknown wire type")
        if position > len(view):
            raise DecodeError("truncated message")
        yield tag >> 3, begin, content, position


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if position == len(view):
            raise DecodeError("truncated message")
        byte = view[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise DecodeError("number of more than 64 bits")
