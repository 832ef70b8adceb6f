"""Reads requests from the wire."""

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import (
    AtlasRequest,
    Chat,
    Edit,
    GenerateRequest,
    Message,
    PromptInput,
    Request,
    Sampling,
    TargetRequest,
    TokenizeRequest,
    TokenRef,
    TraceRequest,
)

CAPABILITIES = (
    "edits",
    "edits.mean",
    "forward_only",
    "generation",
    "generation.stream",
    "corpus",
    "corpus.positions",
    "chat",
    "add_special_tokens",
    "tokenize_only",
)
"""Fields of a job that workers have not always known."""

_DEFAULT = TraceRequest("")


def read_request(spec: types_pb2.JobSpec) -> Request:
    """Read a request; names that are empty on the wire take their defaults.

    Raises `InvalidJob`: the job has no input. (The scheduler refuses such jobs already.)
    """
    if spec.WhichOneof("input") is None:
        raise InvalidJob([Violation("prompt", "is missing: give a prompt, messages or input_ids")])
    edits = tuple(_edit(edit) for edit in spec.edits)
    special = spec.add_special_tokens or not spec.HasField("add_special_tokens")
    targets = tuple(_target(target) for target in spec.targets) or _DEFAULT.targets
    if spec.HasField("corpus"):
        corpus = spec.corpus
        chats = {number: _chat(chat) for number, chat in corpus.chats.items()}
        return AtlasRequest(
            tuple(chats.get(number, prompt) for number, prompt in enumerate(corpus.prompts)),
            spec.top_k,
            spec.rule or _DEFAULT.rule,
            targets,
            edits,
            special,
            corpus.positions,
            corpus.seed,
            corpus.keep_special,
        )
    if spec.tokenize_only:
        return TokenizeRequest(_input(spec), special)
    if spec.HasField("generation"):
        how = spec.generation
        sampling = Sampling(how.max_new_tokens, how.temperature, how.top_p, how.seed)
        return GenerateRequest(_input(spec), sampling, edits, special)
    return TraceRequest(
        _input(spec),
        () if spec.forward_only else tuple(spec.sites) or _DEFAULT.sites,
        spec.reduction or _DEFAULT.reduction,
        targets,
        spec.rule or _DEFAULT.rule,
        tuple(spec.layers),
        spec.top_k,
        edits,
        special,
    )


def _input(spec: types_pb2.JobSpec) -> PromptInput:
    match spec.WhichOneof("input"):
        case "prompt":
            return spec.prompt
        case "chat":
            return _chat(spec.chat)
    return tuple(spec.input_ids.ids)


def _chat(chat: types_pb2.Chat) -> Chat:
    return Chat(tuple(Message(message.role, message.content) for message in chat.messages))


def _edit(edit: types_pb2.Edit) -> Edit:
    change = edit.WhichOneof("change")
    direction = np.frombuffer(edit.direction, "<f4") if change == "direction" else ()
    return Edit(
        site=edit.site,
        layer=edit.layer,
        features=tuple(edit.features),
        positions=tuple(edit.positions),
        scale={"value": 0.0, "mean": 0.0, "scale": edit.scale}.get(change or "", 1.0),
        value=edit.value if change == "value" else 0.0,
        direction=tuple(map(float, direction)),
        mean=edit.mean,
    )


def _target(target: types_pb2.Target) -> TargetRequest:
    continuation: str | tuple[int, ...] | None = None
    if target.HasField("continuation"):
        continuation = tuple(target.continuation.ids.ids)
        if target.continuation.WhichOneof("tokens") == "text":
            continuation = target.continuation.text
    return TargetRequest(
        token=_token(target.token) if target.HasField("token") else None,
        position=target.position if target.HasField("position") else -1,
        contrast=_token(target.contrast) if target.HasField("contrast") else None,
        continuation=continuation,
        each=target.continuation.each,
        logprob=target.logprob,
    )


def _token(ref: types_pb2.TokenRef) -> TokenRef:
    return ref.text if ref.WhichOneof("token") == "text" else ref.id
