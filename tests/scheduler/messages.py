"""Hypothesis strategies for protobuf messages: well-formed in type, wild in value."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_DEEPEST = 4
_MOST_REPEATED = 4

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def messages(
    descriptor: Descriptor, words: st.SearchStrategy[str], depth: int = 0
) -> st.SearchStrategy[Message]:
    """Messages of a type.

    Parameters
    ----------
    descriptor : Descriptor
        The type.
    words : SearchStrategy of str
        Values of its string fields: names and ids that mean something.
    """
    fields = {
        field.name: _values(field, words, depth)
        for field in descriptor.fields
        if depth < _DEEPEST or field.message_type is None
    }
    chosen = st.fixed_dictionaries({}, optional=fields)
    return chosen.map(lambda values: _built(descriptor, values))


def _built(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    message = GetMessageClass(descriptor)()
    for name, value in values.items():
        field = descriptor.fields_by_name[name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            getattr(message, name).extend(value)
        elif field.message_type is not None:
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


def _values(
    field: FieldDescriptor, words: st.SearchStrategy[str], depth: int
) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        one: st.SearchStrategy[Any] = messages(field.message_type, words, depth + 1)
    elif field.enum_type is not None:
        one = st.integers(-1, 9)
    elif field.cpp_type in _BITS:
        least, most = _BITS[field.cpp_type]
        small = st.integers(max(least, -3), 9)
        one = st.one_of(small, st.integers(least, most), st.sampled_from([least, most]))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        one = st.booleans()
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        one = st.floats(width=32)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        one = st.binary(max_size=64)
    else:
        one = words
    return st.lists(one, max_size=_MOST_REPEATED) if field.is_repeated else one
