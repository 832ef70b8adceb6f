"""Checks the arguments of `trace` and translates them to a job of the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict

from reltrace_proto.v1 import types_pb2

from reltrace.types import target
from reltrace.types.checks import check_text, flag, one_of, whole_number
from reltrace.types.edit import EditLike, edits_to_wire
from reltrace.types.errors import invalid
from reltrace.types.prompt import Messages, set_input

DTYPES = {
    "float32": types_pb2.SCALAR_TYPE_FLOAT32,
    "bfloat16": types_pb2.SCALAR_TYPE_BFLOAT16,
    "float16": types_pb2.SCALAR_TYPE_FLOAT16,
}
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Priority: TypeAlias = Literal["interactive", "batch"]
_PRIORITIES: dict[str, types_pb2.Priority.ValueType] = {
    "interactive": types_pb2.PRIORITY_INTERACTIVE,
    "batch": types_pb2.PRIORITY_BATCH,
}
_CHAT = re.compile(r"^chats\[(\d+)\]")
_CALLER_FIELDS = {
    "input": "prompt",
    "chat": "messages",
    "chats": "messages",
    "reduction": "reduce",
}
_MAX_TOP_K = 4096
_MAX_LAYER = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Job:
    """A job whose arguments were checked, with what its result and its errors need.

    Attributes
    ----------
    target : object
        The caller's argument, whose parts errors name.
    first : int
        Of a slice of a corpus, the number of its first prompt.
    id : str or int or None
        The id of its traces.
    """

    spec: types_pb2.JobSpec
    target: object = None
    first: int = 0
    id: str | int | None = None

    @property
    def several(self) -> bool:
        """Whether the caller asked for a list of traces."""
        return target.is_several(self.target)

    def rename(self, wire_field: str) -> str:
        """Return the caller's name of a field of the job."""
        if wire_field.startswith("targets"):
            return target.caller_field(wire_field, self.target)
        if self.spec.HasField("generation"):
            wire_field = wire_field.removeprefix("generation.")
            if wire_field.startswith("edits"):
                return "steer" + wire_field.removeprefix("edits")
        if self.spec.HasField("corpus"):
            wire_field = wire_field.removeprefix("corpus.")
            if chat := _CHAT.match(wire_field):
                return f"prompts[{self.first + int(chat[1])}]{wire_field[chat.end() :]}"
        if wire_field in _CALLER_FIELDS:
            return _CALLER_FIELDS[wire_field]
        if wire_field.startswith("input_ids.ids"):
            return "input_ids" + wire_field.removeprefix("input_ids.ids")
        return wire_field.removeprefix("chat.")


class SharedOptions(TypedDict, total=False):
    """Arguments of `trace` and `trace_many` that do not change the type of the result."""

    add_special_tokens: bool
    model: str | None
    sites: str | Sequence[str]
    reduce: str
    rule: str
    dtype: Dtype
    layers: Sequence[int] | None
    top_k: int | None
    edits: EditLike | Sequence[EditLike]
    priority: Priority
    timeout: float | None


class TraceOptions(SharedOptions, total=False):
    """Further ones of `trace`."""

    messages: Messages | None
    input_ids: Sequence[int] | None


class TraceManyOptions(SharedOptions, total=False):
    """Further ones of `trace_many`."""

    ordered: bool
    progress: bool
    output_uri: str | None
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of `trace` that describe a job."""

    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    model: str | None = None
    sites: str | Sequence[str] = ("resid",)
    reduce: str = "token"
    target: Any = "max"
    rule: str = "attnlrp"
    dtype: Dtype = "float32"
    layers: Sequence[int] | None = None
    top_k: int | None = None
    output_uri: str | None = None
    edits: EditLike | Sequence[EditLike] = ()

    def with_item(self, item: object) -> Arguments:
        """Return these arguments as defaults, overridden by an item of `trace_many`."""
        if isinstance(item, str):
            return replace(self, prompt=item)
        if not isinstance(item, Mapping):
            raise invalid(
                "item", f"must be a prompt or a mapping of arguments, not {type(item).__name__}"
            )
        given = {key: value for key, value in item.items() if key != "id"}
        unknown = [key for key in given if key not in Arguments.__slots__]
        if unknown:
            raise invalid(
                str(unknown[0]),
                f"is not an argument of trace(); allowed: id, {', '.join(Arguments.__slots__)}",
            )
        return replace(self, **given)

    def job(self) -> Job:
        """Check the arguments and build the job."""
        job = self.template()
        set_input(job.spec, self.prompt, self.input_ids, self.messages, self.add_special_tokens)
        return job

    def template(self) -> Job:
        """Check everything but the input, and build a job without one."""
        flag(self.add_special_tokens, "add_special_tokens")
        spec = types_pb2.JobSpec(
            model=model_name(self.model),
            reduction=_name(self.reduce, "reduce"),
            rule=_name(self.rule, "rule"),
            targets=target.to_wire(self.target),
        )
        spec.dtype = one_of(self.dtype, "dtype", DTYPES)
        spec.sites.extend(_sites(self.sites))
        if self.layers is not None:
            spec.layers.extend(_layers(self.layers))
        if self.top_k is not None or self.reduce == "topk":
            spec.top_k = _top_k(self.top_k, self.reduce)
        if self.output_uri is not None:
            spec.output_uri = _uri(self.output_uri)
        spec.edits.extend(edits_to_wire(self.edits))
        spec.forward_only = not spec.sites
        return Job(spec, self.target)


def tokenize_job(
    prompt: object, messages: object, add_special_tokens: object, model: object
) -> Job:
    """Check the arguments of `tokenize` and build its job."""
    spec = types_pb2.JobSpec(model=model_name(model), tokenize_only=True)
    set_input(spec, prompt, None, messages, add_special_tokens)
    return Job(spec)


def wire_priority(priority: object) -> types_pb2.Priority.ValueType:
    """Translate a `priority` argument."""
    wire: types_pb2.Priority.ValueType = one_of(priority, "priority", _PRIORITIES)
    return wire


_ITEM_KEYS = frozenset({"id", "prompt", "input_ids", "messages", "model"})


class JobMaker:
    """Builds the jobs of many items, whose shared arguments it checks only once.

    Raises `InvalidArgument` if one of these is wrong.
    """

    def __init__(self, defaults: Arguments) -> None:
        self._defaults = defaults
        self._model: object = defaults.model
        self._template = defaults.template()

    def job(self, item: object, name: str | int | None = None) -> Job:
        """Check an item and build its job, whose traces get this id."""
        defaults = self._defaults
        inputs: tuple[object, object, object]
        if isinstance(item, str):
            inputs, model = (item, None, None), defaults.model
        elif isinstance(item, Mapping) and item.keys() <= _ITEM_KEYS:
            inputs = (item.get("prompt"), item.get("input_ids"), item.get("messages"))
            model = item.get("model", defaults.model)
        else:
            return replace(defaults.with_item(item).job(), id=name)
        if model != self._model:
            self._template, self._model = replace(defaults, model=model).template(), model
        template = self._template
        spec = types_pb2.JobSpec()
        spec.CopyFrom(template.spec)
        set_input(spec, *inputs, defaults.add_special_tokens)
        return Job(spec, template.target, id=name)


def model_name(model: object) -> str:
    """Check a `model` argument; return its name on the wire."""
    return "" if model is None else _name(model, "model")


def _name(value: object, argument: str) -> str:
    if not isinstance(value, str):
        raise invalid(argument, f"must be str, not {type(value).__name__}")
    check_text(value, argument)
    return value


def _uri(value: object) -> str:
    uri = _name(value, "output_uri")
    if not re.match(r"^[a-z][a-z0-9+.-]*://.", uri):
        raise invalid("output_uri", f"must be a URL such as s3://bucket/folder, not {uri!r}")
    return uri.rstrip("/")


def _sites(sites: object) -> list[str]:
    if isinstance(sites, str):
        sites = (sites,)
    if not isinstance(sites, Sequence):
        raise invalid("sites", f"must be a name or a sequence of names, not {sites!r}")
    names = [_name(site, f"sites[{index}]") for index, site in enumerate(sites)]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise invalid(f"sites[{index}]", f"repeats {name!r}")
    return names


def _layers(layers: object) -> tuple[int, ...]:
    """Check the layers; the worker checks that the model has them."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise invalid("layers", f"must be a sequence of layer numbers, not {layers!r}")
    if not layers:
        raise invalid("layers", "must name at least one layer; leave it out for all")
    for index, layer in enumerate(layers):
        if whole_number(layer, f"layers[{index}]", most=_MAX_LAYER) in layers[:index]:
            raise invalid(f"layers[{index}]", f"repeats {layer}")
    return tuple(layers)


def _top_k(top_k: object, reduce: str) -> int:
    if reduce != "topk":
        raise invalid("top_k", f'is for reduce="topk", not {reduce!r}')
    if top_k is None:
        raise invalid("top_k", 'is missing; reduce="topk" needs the number of values per layer')
    return whole_number(top_k, "top_k", 1, _MAX_TOP_K)
