"""The input of a job: a text, the messages of a conversation, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from reltrace_proto.v1 import types_pb2

from reltrace.types.checks import check_encodable, check_text, flag
from reltrace.types.errors import invalid
from reltrace.types.target import token_ids

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""The messages of a conversation, the oldest first: each with "role" and "content", a text or a
list of parts `{"type": "text", "text": "..."}`, whose texts are concatenated."""

# The server takes requests of 16 MiB, which hold a little more than the job.
MAX_JOB_BYTES = 16 * 1024 * 1024 - 4096


def set_input(
    spec: types_pb2.JobSpec,
    prompt: object = None,
    input_ids: object = None,
    messages: object = None,
    add_special_tokens: object = True,
) -> None:
    """Set the input of a job, given in exactly one of three forms, and check the job's size."""
    inputs = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    given = [name for name, value in inputs.items() if value is not None]
    if not given:
        raise invalid("prompt", "is missing; give prompt, messages or input_ids")
    if len(given) > 1:
        raise invalid(given[0], f"excludes {given[1]}; give one of prompt, messages and input_ids")
    flag(add_special_tokens, "add_special_tokens")
    if input_ids is not None:
        spec.input_ids.ids.extend(token_ids(input_ids, "input_ids"))
    elif messages is not None:
        spec.chat.CopyFrom(chat_to_wire(messages))
    elif not isinstance(prompt, str):
        raise invalid("prompt", f"must be str, not {type(prompt).__name__}")
    else:
        check_text(prompt, "prompt")
        spec.prompt = prompt
        # The default is not sent, since servers of older versions do not know the field.
        if not add_special_tokens:
            spec.add_special_tokens = False
    size = spec.ByteSize()
    if size > MAX_JOB_BYTES:
        raise invalid(given[0], f"makes a job of {size} bytes; the limit is {MAX_JOB_BYTES}")


def chat_to_wire(messages: object, argument: str = "messages") -> types_pb2.Chat:
    """Translate the messages of a conversation; errors name the message and its field."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise invalid(
            argument,
            'must be a list of messages such as {"role": "user", "content": "..."}, not '
            f"{type(messages).__name__}",
        )
    if not messages:
        raise invalid(argument, "must have at least one message")
    chat = types_pb2.Chat()
    for index, message in enumerate(messages):
        name = f"{argument}[{index}]"
        _check_mapping(message, ("role", "content"), name)
        _check_keys(message, ("role", "content"), name, "message")
        role, content = _text(message, "role", name), _content(message, name)
        if not role:
            raise invalid(f"{name}.role", "must not be empty")
        chat.messages.add(role=role, content=content)
    return chat


def _content(message: Mapping[str, Any], name: str) -> str:
    """Return the content of a message: its text, or the texts of its parts, concatenated."""
    parts = message.get("content")
    if isinstance(parts, str | bytes) or not isinstance(parts, Sequence):
        return _text(message, "content", name)
    if not parts:
        raise invalid(f"{name}.content", "must have at least one part")
    texts = []
    for index, part in enumerate(parts):
        field = f"{name}.content[{index}]"
        _check_mapping(part, ("type", "text"), field)
        if (kind := _text(part, "type", field)) != "text":
            raise invalid(f"{field}.type", f"must be 'text', not {kind!r}")
        _check_keys(part, ("type", "text"), field, "part")
        texts.append(_text(part, "text", field))
    return "".join(texts)


def _check_mapping(value: object, keys: Sequence[str], name: str) -> None:
    if not isinstance(value, Mapping):
        raise invalid(
            name, f"must be a mapping with {' and '.join(keys)}, not {type(value).__name__}"
        )


def _check_keys(given: Mapping[str, Any], allowed: Sequence[str], name: str, what: str) -> None:
    for key in given:
        if key not in allowed:
            raise invalid(
                f"{name}.{key}", f"is not a field of a {what}; allowed: {' and '.join(allowed)}"
            )


def _text(message: Mapping[str, Any], key: str, name: str) -> str:
    value = message.get(key)
    if value is None:
        raise invalid(f"{name}.{key}", "is missing")
    if not isinstance(value, str):
        raise invalid(f"{name}.{key}", f"must be text, not {type(value).__name__}")
    check_encodable(value, f"{name}.{key}")
    return value
