"""How large the result of a job may become, as far as that is known before its prompt is read."""

from collections.abc import Iterator
from dataclasses import dataclass

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.errors import Violation
from reltrace_scheduler.limits import MAX_NEW_TOKENS

LESS = (
    "ask for fewer layers, sites or targets, or for less of each: reduce='topk', 'token' or "
    "'feature', dtype='bfloat16'; or have large results stored: output_uri, or the scheduler's "
    "--results-url"
)

_HALVES = (types_pb2.SCALAR_TYPE_BFLOAT16, types_pb2.SCALAR_TYPE_FLOAT16)

# Everything of a result but its tensors: at most about so many bytes of each.
_TOKEN_BYTES, _TARGET_BYTES, _RESULT_BYTES = 64, 1024, 1024

# Tokens that a chat template, or the tokenizer, adds to a message or a prompt.
_ADDED_TOKENS = 64

_UNKNOWN = 1 << 62

_PLACE_BYTES, _LISTS = 12, 4
"""Of an atlas: one place, and the lists of places that a feature has."""


@dataclass(frozen=True, slots=True)
class _Range:
    least: int
    most: int

    def __add__(self, other: "_Range") -> "_Range":
        return _Range(self.least + other.least, self.most + other.most)


@dataclass(frozen=True, slots=True)
class ResultLimits:
    """What results may take: `most` bytes are sent, tensors of more than `stored_above` stored."""

    most: int
    stored_above: int | None
    """None: there is no store for those that are large."""

    def faults(self, spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
        """Yield why the result of a job would be too large, whatever its prompt turns out to be."""
        if spec.output_uri or self.stored_above is not None:
            return
        least = _tensor_bytes(spec, model).least
        if least > self.most:
            field = "top_k" if spec.HasField("corpus") or spec.reduction == "topk" else "reduction"
            yield Violation(
                field,
                f"gives a result of {in_units(least)} at least, and at most {in_units(self.most)} "
                f"go through the queue (--max-result-bytes): {LESS}",
            )

    def bytes(self, spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> int:
        """Return how many bytes the result of a job takes in the queue at most."""
        tensors = 0 if spec.output_uri else _tensor_bytes(spec, model).most
        if self.stored_above is not None:
            tensors = min(tensors, self.stored_above)
        tokens = _tokens(spec, model).most
        if spec.HasField("generation"):
            tokens += min(spec.generation.max_new_tokens, MAX_NEW_TOKENS)
        header = _TOKEN_BYTES * tokens + _TARGET_BYTES * _traces(spec).most + _RESULT_BYTES
        return min(tensors + header, self.most)


def in_units(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size} bytes ({size / unit:.3g} {name})"
    return f"{size} bytes"


def _tensor_bytes(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> _Range:
    if spec.HasField("corpus"):
        features = model.layers * (model.intermediate_size + model.heads)
        return _Range(features * spec.top_k * _LISTS * _PLACE_BYTES, _UNKNOWN)
    if spec.tokenize_only or spec.forward_only or spec.HasField("generation"):
        return _Range(0, 0)
    tokens, traces = _tokens(spec, model), _traces(spec)
    value = 2 if spec.dtype in _HALVES else 4
    least = most = 0
    for site in spec.sites or ("resid",):
        features = {"head": model.heads, "neuron": model.intermediate_size}.get(
            site, model.hidden_size
        )
        layers = 1 if site == "embed" else len(spec.layers) or model.layers
        least += layers * _values(spec, tokens.least, features, value, unknown=0)
        most += layers * _values(spec, tokens.most, features, value, unknown=_UNKNOWN)
    return _Range(least * traces.least, most * traces.most)


def _values(spec: types_pb2.JobSpec, tokens: int, features: int, value: int, unknown: int) -> int:
    """Return the bytes of one layer of a site, reduced; of other reductions, `unknown`."""
    match spec.reduction or "token":
        case "token":
            return tokens * value
        case "feature":
            return features * value
        case "topk":
            # A value and two indices.
            return min(spec.top_k, tokens * features) * (value + 8)
        case "full":
            return tokens * features * value
    return unknown


def _tokens(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> _Range:
    """Return how many tokens the model reads: of a text, at most one for each byte."""
    match spec.WhichOneof("input"):
        case "input_ids":
            count = len(spec.input_ids.ids)
            prompt = _Range(count, count)
        case "chat":
            texts = [text for one in spec.chat.messages for text in (one.role, one.content)]
            prompt = _Range(1, sum(len(text.encode()) + _ADDED_TOKENS for text in texts))
        case _:
            prompt = _Range(1, len(spec.prompt.encode()) + _ADDED_TOKENS)
    for target in spec.targets:
        if target.HasField("continuation"):
            # All but its last token, and there is one continuation.
            answer = _answer(target)
            prompt += _Range(answer.least - 1, answer.most - 1)
            break
    return _Range(prompt.least, min(prompt.most, model.context_length or prompt.most))


def _traces(spec: types_pb2.JobSpec) -> _Range:
    total = _Range(0, 0)
    for target in spec.targets:
        total += _answer(target) if target.continuation.each else _Range(1, 1)
    return total if spec.targets else _Range(1, 1)


def _answer(target: types_pb2.Target) -> _Range:
    """Return how many tokens a continuation has."""
    if count := len(target.continuation.ids.ids):
        return _Range(count, count)
    return _Range(1, len(target.continuation.text.encode()) + _ADDED_TOKENS)
