"""How large the result of a job may become, as far as that is known before its prompt is read."""

from collections.abc import Sequence
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

# Tokens that the tokenizer adds to a text, and a chat template to a conversation.
_ADDED_TOKENS, _CHAT_TOKENS = 16, 128

_LONG_TOKEN = 16
"""Bytes: of a text that has fewer tokens than one for so many, most is blank, or one word."""

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
class ResultSize:
    """The size of a job's result in the queue: at most `bytes`, unless it can not be run."""

    bytes: int
    fault: Violation | None


@dataclass(frozen=True, slots=True)
class ResultLimits:
    """What results may take: `most` bytes are sent, tensors of more than `stored_above` stored."""

    most: int
    stored_above: int | None
    """None: there is no store for those that are large."""

    def size(self, spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> ResultSize:
        """Return how large the result of a job becomes, and what is wrong with that.

        Where there is a store, a result that is all but surely large is taken to go there.
        """
        tokens, traces = _tokens(spec, model), _traces(spec)
        fault = None
        if spec.output_uri:
            tensors = 0
        else:
            known = _tensor_bytes(spec, model, tokens, traces)
            tensors = known.most
            if self.stored_above is None:
                fault = self._fault(spec, known.least)
            else:
                likely = _tensor_bytes(spec, model, _tokens(spec, model, _LONG_TOKEN), traces)
                is_large = likely.least > self.stored_above
                tensors = 0 if is_large else min(tensors, self.stored_above)
        all_tokens = tokens.most
        if spec.HasField("generation"):
            all_tokens += min(spec.generation.max_new_tokens, MAX_NEW_TOKENS)
        header = _TOKEN_BYTES * all_tokens + _TARGET_BYTES * traces.most + _RESULT_BYTES
        return ResultSize(min(tensors + header, self.most), fault)

    def _fault(self, spec: types_pb2.JobSpec, least: int) -> Violation | None:
        """Return why the result is too large, whatever the prompt turns out to be."""
        if least <= self.most:
            return None
        field = "top_k" if spec.HasField("corpus") or spec.reduction == "topk" else "reduction"
        return Violation(
            field,
            f"gives a result of {in_units(least)} at least, and at most {in_units(self.most)} "
            f"go through the queue (--max-result-bytes): {LESS}",
        )


def in_units(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size} bytes ({size / unit:.3g} {name})"
    return f"{size} bytes"


def _tensor_bytes(
    spec: types_pb2.JobSpec, model: types_pb2.ModelInfo, tokens: _Range, traces: _Range
) -> _Range:
    if spec.HasField("corpus"):
        features = model.layers * (model.intermediate_size + model.heads)
        return _Range(features * spec.top_k * _LISTS * _PLACE_BYTES, _UNKNOWN)
    if spec.tokenize_only or spec.forward_only or spec.HasField("generation"):
        return _Range(0, 0)
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


def _tokens(
    spec: types_pb2.JobSpec, model: types_pb2.ModelInfo, token_bytes: int = _UNKNOWN
) -> _Range:
    """Return how many tokens the model reads; of an atlas, how many different ones.

    Of a text, at most one for each byte, and at least one for each `token_bytes`.
    """
    match spec.WhichOneof("input"):
        case "input_ids":
            count = len(spec.input_ids.ids)
            prompt = _Range(count, count)
        case "chat":
            texts = [text for one in spec.chat.messages for text in (one.role, one.content)]
            prompt = _of_texts(texts, token_bytes) + _Range(0, _CHAT_TOKENS)
        case "corpus":
            chats = [one.content for chat in spec.corpus.chats.values() for one in chat.messages]
            found = _of_texts([*spec.corpus.prompts, *chats], token_bytes)
            return _Range(1, min(found.most, model.vocab_size))
        case _:
            prompt = _of_texts([spec.prompt], token_bytes)
    for target in spec.targets:
        if target.HasField("continuation"):
            # All but its last token, and there is one continuation.
            answer = _answer(target)
            prompt += _Range(answer.least - 1, answer.most - 1)
            break
    return _Range(prompt.least, min(prompt.most, model.context_length or prompt.most))


def _of_texts(texts: Sequence[str], token_bytes: int) -> _Range:
    size = sum(len(text.encode()) for text in texts)
    return _Range(max(1, size // token_bytes), size + len(texts) * _ADDED_TOKENS)


def _traces(spec: types_pb2.JobSpec) -> _Range:
    """Return how many traces a job has: one of each target, or of each token of a continuation."""
    total = _Range(max(1, len(spec.targets)), max(1, len(spec.targets)))
    for target in spec.targets:
        if target.HasField("continuation") and target.continuation.each:
            answer = _answer(target)
            total += _Range(answer.least - 1, answer.most - 1)
    return total


def _answer(target: types_pb2.Target) -> _Range:
    """Return how many tokens a continuation has."""
    if count := len(target.continuation.ids.ids):
        return _Range(count, count)
    return _of_texts([target.continuation.text], _UNKNOWN)
