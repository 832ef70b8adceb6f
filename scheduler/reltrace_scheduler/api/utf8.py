"""Finds the field that kept a message from being parsed: text that is not UTF-8.

protobuf says only that parsing failed. The same bytes are parsed again by a copy of
the message type whose strings are bytes, and the copy's fields are then searched.
"""

from collections.abc import Iterator
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass


def undecodable_field(descriptor: Descriptor, data: bytes) -> str | None:
    """Return the path (``jobs[0].prompt``) of the first text that is not UTF-8.

    None: the bytes are no such message at all.
    """
    try:
        message = _lenient(descriptor.full_name, descriptor.file).FromString(data)
    except DecodeError:
        return None
    return next(_invalid(message, descriptor), None)


@cache
def _lenient(name: str, file: FileDescriptor) -> type[Message]:
    pool = DescriptorPool()
    _add(pool, file, set())
    return GetMessageClass(pool.FindMessageTypeByName(name))


def _add(pool: DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add(pool, dependency, added)
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    for message in proto.message_type:
        _strings_to_bytes(message)
    pool.Add(proto)


def _strings_to_bytes(message: DescriptorProto) -> None:
    for field in message.field:
        if field.type == FieldDescriptorProto.TYPE_STRING:
            field.type = FieldDescriptorProto.TYPE_BYTES
    for nested in message.nested_type:
        # Map keys can not be bytes; a map with an invalid key stays unnamed.
        if not nested.options.map_entry:
            _strings_to_bytes(nested)


def _invalid(message: Message, original: Descriptor) -> Iterator[str]:
    for field, value in message.ListFields():
        declared = original.fields_by_number[field.number]
        values = value if field.is_repeated else [value]
        for index, item in enumerate(values):
            path = f"{field.name}[{index}]" if field.is_repeated else field.name
            if declared.type == FieldDescriptor.TYPE_STRING and isinstance(item, bytes):
                if not _is_utf8(item):
                    yield path
            elif isinstance(item, Message):
                assert declared.message_type is not None
                for inner in _invalid(item, declared.message_type):
                    yield f"{path}.{inner}"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
