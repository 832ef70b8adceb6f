"""What is wrong with a job, as far as its model's announcement tells.

What only the tokenizer can tell (is the prompt too long, is the target one token) is
checked by the worker; the job then fails with the same kind of violations.
"""

from collections.abc import Iterable, Iterator

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler import limits
from reltrace_scheduler.api.edits import edit_faults
from reltrace_scheduler.errors import Violation

_RESULT_DTYPES = (
    types_pb2.SCALAR_TYPE_UNSPECIFIED,
    types_pb2.SCALAR_TYPE_FLOAT32,
    types_pb2.SCALAR_TYPE_BFLOAT16,
    types_pb2.SCALAR_TYPE_FLOAT16,
)

# Corpora and chats are inputs, and checked with them.
_CAPABILITIES = (
    "edits",
    "edits.mean",
    "forward_only",
    "generation",
    "generation.stream",
    "add_special_tokens",
    "tokenize_only",
)

# What a kind of job excludes, and why.
_EXCLUDED = {
    "forward_only": (("sites",), "needs a backward pass, and forward_only excludes it"),
    "generation": (
        ("sites", "targets", "forward_only", "output_uri"),
        "is for a trace, and the job asks for a generation",
    ),
    "tokenize_only": (
        ("sites", "targets", "edits", "forward_only", "output_uri", "generation"),
        "is not for a job that asks for tokens only",
    ),
    "corpus": (
        ("sites", "reduction", "layers", "forward_only", "output_uri", "generation",
         "tokenize_only"),
        "is not for an atlas",
    ),
}  # fmt: skip


def input_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    """Yield what is wrong with the input of a job, and with what depends on it."""
    match spec.WhichOneof("input"):
        case "prompt":
            if not spec.prompt:
                yield Violation("prompt", "is empty")
            size = len(spec.prompt.encode())
            yield from _range_faults("prompt", size, 0, limits.MAX_PROMPT_BYTES, " bytes")
        case "input_ids":
            yield from _ids_faults(spec, model)
        case "corpus":
            yield from _corpus_faults(spec, model)
        case "chat":
            yield from _capability_faults("messages", "chat", model)
            yield from _chat_faults(spec.chat, "messages")
        case _:
            yield Violation("prompt", "is missing: give a prompt, messages or input_ids")


def settings_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    """Yield what is wrong with a job, whatever its input is."""
    yield from _exclusion_faults(spec, "forward_only")
    for name in _CAPABILITIES:
        if _needs(spec, name):
            yield from _capability_faults(name, name, model)
    yield from edit_faults(spec, model)
    yield from _generation_faults(spec, model)
    yield from _exclusion_faults(spec, "tokenize_only")
    for index, site in enumerate(spec.sites):
        if site not in model.sites:
            yield Violation(f"sites[{index}]", _not_among(site, model.sites))
        elif site in spec.sites[:index]:
            yield Violation(f"sites[{index}]", f"{site!r} is named twice")
    for name, allowed in (("rule", model.rules), ("reduction", model.reductions)):
        if (value := getattr(spec, name)) and value not in allowed:
            yield Violation(name, _not_among(value, allowed))
    if spec.HasField("timeout"):
        seconds = spec.timeout.seconds + spec.timeout.nanos / 1e9
        yield from _range_faults("timeout", seconds, limits.MIN_TIMEOUT, limits.MAX_TIMEOUT, " s")
    if spec.dtype not in _RESULT_DTYPES:
        yield Violation("dtype", "is not one of float32, bfloat16, float16")
    count = len(spec.targets)
    yield from _range_faults("targets", count, 0, limits.MAX_TARGETS_PER_JOB, " targets")
    for index, target in enumerate(spec.targets):
        yield from (fault.within(f"targets[{index}]") for fault in _target_faults(target, model))


def _is_set(spec: types_pb2.JobSpec, name: str) -> bool:
    has_presence = spec.DESCRIPTOR.fields_by_name[name].has_presence
    return spec.HasField(name) if has_presence else bool(getattr(spec, name))  # type: ignore[arg-type]


def _range_faults(
    field: str, value: float, least: float, most: float, unit: str = ""
) -> Iterator[Violation]:
    if not least <= value <= most:
        yield Violation(field, f"is {value}{unit}; allowed: {least} to {most}{unit}")


def _exclusion_faults(spec: types_pb2.JobSpec, kind: str) -> Iterator[Violation]:
    names, reason = _EXCLUDED[kind]
    if _is_set(spec, kind):
        yield from (Violation(name, reason) for name in names if _is_set(spec, name))


def _needs(spec: types_pb2.JobSpec, capability: str) -> bool:
    match capability:
        case "edits.mean":
            return any(edit.mean for edit in spec.edits)
        case "generation.stream":
            return spec.generation.stream
        case "add_special_tokens":
            # Any worker adds them.
            return spec.HasField("add_special_tokens") and not spec.add_special_tokens
    return _is_set(spec, capability)


def _capability_faults(
    field: str, capability: str, model: types_pb2.ModelInfo
) -> Iterator[Violation]:
    if capability not in model.capabilities:
        yield Violation(field, f"is more than the workers of {model.name} can do")


def _ids_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    ids, count = spec.input_ids.ids, len(spec.input_ids.ids)
    if not count:
        yield Violation("input_ids", "is empty")
        return
    yield from _range_faults("input_ids", count, 1, model.context_length, " tokens")
    if max(ids) >= model.vocab_size:
        bad = next(index for index, token in enumerate(ids) if token >= model.vocab_size)
        yield Violation(f"input_ids[{bad}]", _out_of_range(ids[bad], model))
    for index, target in enumerate(spec.targets):
        if target.HasField("position") and not -count <= target.position < count:
            fault = f"{target.position} is outside of the {count} tokens of input_ids"
            yield Violation(f"targets[{index}].position", fault)


def _chat_faults(chat: types_pb2.Chat, field: str) -> Iterator[Violation]:
    count = len(chat.messages)
    if not 1 <= count <= limits.MAX_MESSAGES:
        yield from _range_faults(field, count, 1, limits.MAX_MESSAGES, " messages")
        return
    size = sum(len(message.content.encode()) for message in chat.messages)
    yield from _range_faults(field, size, 0, limits.MAX_PROMPT_BYTES, " bytes")
    for index, message in enumerate(chat.messages):
        length = len(message.role)
        yield from _range_faults(
            f"{field}[{index}].role", length, 1, limits.MAX_ROLE, " characters"
        )


def _corpus_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    yield from _capability_faults("corpus", "corpus", model)
    corpus = spec.corpus
    if corpus.chats:
        yield from _capability_faults("corpus.chats", "chat", model)
    if corpus.positions or corpus.keep_special:
        yield from _capability_faults("corpus.positions", "corpus.positions", model)
    if corpus.positions and spec.targets:
        yield Violation("targets", "are the prompts' own next tokens, by corpus.positions")
    if corpus.seed and not corpus.positions:
        yield Violation("corpus.seed", "draws corpus.positions, and none is asked for")
    count = len(corpus.prompts)
    for number, chat in sorted(corpus.chats.items()):
        field = f"corpus.chats[{number}]"
        if number >= count or corpus.prompts[number]:
            yield Violation(field, f"takes the place of an empty prompt; there are {count} prompts")
        yield from _chat_faults(chat, f"{field}.messages")
    yield from _range_faults("corpus.prompts", count, 1, limits.MAX_CORPUS_PROMPTS, " prompts")
    yield from _range_faults("top_k", spec.top_k, 1, limits.MAX_ATLAS_TOP_K, " of an atlas")
    if len(spec.targets) > 1:
        yield Violation("targets", "has several; of an atlas there is one")
    yield from _exclusion_faults(spec, "corpus")


def _generation_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    if not spec.HasField("generation"):
        return
    generation = spec.generation
    most = min(limits.MAX_NEW_TOKENS, model.context_length)
    yield from _range_faults("generation.max_new_tokens", generation.max_new_tokens, 1, most)
    yield from _range_faults(
        "generation.temperature", generation.temperature, 0, limits.MAX_TEMPERATURE
    )
    yield from _range_faults("generation.top_p", generation.top_p, 0, 1)
    yield from _exclusion_faults(spec, "generation")


def _target_faults(target: types_pb2.Target, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    for field in ("token", "contrast"):
        if target.HasField(field):
            ref: types_pb2.TokenRef = getattr(target, field)
            match ref.WhichOneof("token"):
                case "id" if ref.id >= model.vocab_size:
                    yield Violation(field, _out_of_range(ref.id, model))
                case "text" if not ref.text:
                    yield Violation(field, "is empty text")
                case None:
                    yield Violation(field, "names no token: give its text or its id")
    if target.HasField("continuation"):
        others = [name for name in ("token", "contrast", "position") if target.HasField(name)]
        if others:
            yield Violation("continuation", f"can not be combined with {', '.join(others)}")
        ids, kind = target.continuation.ids.ids, target.continuation.WhichOneof("tokens")
        if kind is None:
            yield Violation("continuation", "names no tokens: give their text or their ids")
        elif not (ids or target.continuation.text):
            yield Violation("continuation", "is empty")
        bad = next((token for token in ids if token >= model.vocab_size), None)
        if bad is not None:
            yield Violation("continuation", _out_of_range(bad, model))


def _out_of_range(token: int, model: types_pb2.ModelInfo) -> str:
    return f"token id {token} is not in 0..{model.vocab_size - 1} of {model.name}"


def _not_among(name: str, allowed: Iterable[str]) -> str:
    return f"{name!r} is not one of {', '.join(allowed)}"
