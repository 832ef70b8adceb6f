"""Between the wire and the engine: the only place where both are known."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine import REDUCTIONS, SITES
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import (
    AtlasJob,
    AtlasRequest,
    Chat,
    Edit,
    GenerateRequest,
    Message,
    PromptInput,
    Request,
    Sampling,
    TargetRequest,
    TokenizedPrompt,
    TokenizeRequest,
    TokenRef,
    TraceRequest,
)
from reltrace_worker.types.results import GeneratedText, ResolvedTarget, SiteTensor

_TORCH_DTYPES = {
    types_pb2.SCALAR_TYPE_FLOAT32: torch.float32,
    types_pb2.SCALAR_TYPE_BFLOAT16: torch.bfloat16,
    types_pb2.SCALAR_TYPE_FLOAT16: torch.float16,
    types_pb2.SCALAR_TYPE_INT32: torch.int32,
    types_pb2.SCALAR_TYPE_INT64: torch.int64,
}
_SCALAR_TYPES = {dtype: scalar for scalar, dtype in _TORCH_DTYPES.items()}


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


def scalar_type(dtype: torch.dtype) -> types_pb2.ScalarType.ValueType:
    """Return the wire's name of a torch dtype."""
    return _SCALAR_TYPES[dtype]


def model_info(loaded: LoadedModel) -> types_pb2.ModelInfo:
    """Write what a worker announces of its model, and of what it can do with it."""
    return types_pb2.ModelInfo(
        name=loaded.name,
        revision=loaded.revision,
        architecture=type(loaded.model).__name__,
        layers=loaded.shape.layers,
        hidden_size=loaded.shape.hidden_size,
        heads=loaded.shape.heads,
        intermediate_size=loaded.shape.intermediate_size,
        vocab_size=loaded.shape.vocab_size,
        context_length=loaded.context_length,
        # Tied weights count once, and those that are packed into 4 bits one by one.
        parameters=loaded.model.num_parameters(),
        dtype=scalar_type(loaded.dtype),
        sites=SITES,
        rules=RULES,
        reductions=REDUCTIONS,
        capabilities=CAPABILITIES,
    )


def read_request(spec: types_pb2.JobSpec) -> Request:
    """Read a request; names that are empty on the wire take their defaults.

    Raises
    ------
    InvalidJob
        The job has no input. (The scheduler refuses such jobs already.)
    """
    if spec.WhichOneof("input") is None:
        raise InvalidJob([Violation("prompt", "is missing: give a prompt, messages or input_ids")])
    default = TraceRequest("")
    edits = tuple(_edit(edit) for edit in spec.edits)
    special = spec.add_special_tokens or not spec.HasField("add_special_tokens")
    targets = tuple(_target(target) for target in spec.targets) or default.targets
    if spec.HasField("corpus"):
        corpus = spec.corpus
        chats = {number: _chat(chat) for number, chat in corpus.chats.items()}
        return AtlasRequest(
            tuple(chats.get(number, prompt) for number, prompt in enumerate(corpus.prompts)),
            spec.top_k,
            spec.rule or default.rule,
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
        () if spec.forward_only else tuple(spec.sites) or default.sites,
        spec.reduction or default.reduction,
        targets,
        spec.rule or default.rule,
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


def generated(written: GeneratedText) -> types_pb2.Generated:
    """Write what a model wrote."""
    return types_pb2.Generated(
        token_ids=written.token_ids,
        tokens=written.tokens,
        text=written.text,
        logprobs=written.logprobs,
        stopped=written.stopped,
    )


def _edit(edit: types_pb2.Edit) -> Edit:
    change = edit.WhichOneof("change")
    return Edit(
        site=edit.site,
        layer=edit.layer,
        features=tuple(edit.features),
        positions=tuple(edit.positions),
        scale={"value": 0.0, "mean": 0.0, "scale": edit.scale}.get(change or "", 1.0),
        value=edit.value if change == "value" else 0.0,
        direction=tuple(np.frombuffer(edit.direction, "<f4").tolist())
        if change == "direction"
        else (),
        mean=edit.mean,
    )


def _target(target: types_pb2.Target) -> TargetRequest:
    continuation: str | tuple[int, ...] | None = None
    if target.HasField("continuation"):
        continuation = (
            target.continuation.text
            if target.continuation.WhichOneof("tokens") == "text"
            else tuple(target.continuation.ids.ids)
        )
    return TargetRequest(
        token=_token_ref(target.token) if target.HasField("token") else None,
        position=target.position if target.HasField("position") else -1,
        contrast=_token_ref(target.contrast) if target.HasField("contrast") else None,
        continuation=continuation,
        each=target.continuation.each,
        logprob=target.logprob,
    )


def _token_ref(ref: types_pb2.TokenRef) -> TokenRef:
    return ref.text if ref.WhichOneof("token") == "text" else ref.id


def result_dtype(spec: types_pb2.JobSpec) -> torch.dtype:
    """Return the number format in which a job wants its relevance."""
    return _TORCH_DTYPES[spec.dtype or types_pb2.SCALAR_TYPE_FLOAT32]


def header(
    prompt: TokenizedPrompt,
    provenance: types_pb2.Provenance,
    layers: Sequence[int],
    targets: tuple[ResolvedTarget, ...] = (),
    hints: tuple[str, ...] = (),
) -> types_pb2.TraceHeader:
    """Write everything of a result but its tensors, with the layers that it has."""
    return types_pb2.TraceHeader(
        token_ids=prompt.token_ids,
        tokens=prompt.tokens,
        targets=[_resolved(target) for target in targets],
        provenance=provenance,
        layers=layers,
        text=prompt.text,
        offsets=chain.from_iterable(prompt.offsets),
        turns=[
            types_pb2.Turn(role=turn.role, first=turn.tokens[0], stop=turn.tokens[1])
            for turn in prompt.turns
        ],
        hints=(*prompt.hints, *hints),
        special_positions=prompt.special_positions,
    )


def corpus_header(
    corpus: AtlasJob,
    targets: Sequence[ResolvedTarget],
    provenance: types_pb2.Provenance,
    layers: int,
) -> types_pb2.TraceHeader:
    """Write everything of an atlas but its tensors, for a model of so many layers."""
    explained = {target.token_id: target.token for target in targets}
    for job in corpus.prompts:
        explained.update(zip(job.token_ids, job.prompt.tokens, strict=True))
    vocabulary = dict(sorted(explained.items()))
    return types_pb2.TraceHeader(
        token_ids=vocabulary.keys(),
        tokens=vocabulary.values(),
        provenance=provenance,
        layers=range(layers),
        special_positions=[i for i, token in enumerate(vocabulary) if token in corpus.special],
        skipped=[
            types_pb2.FieldViolation(field=f"corpus.prompts[{number}]", description=why)
            for number, why in corpus.skipped
        ],
    )


def _resolved(target: ResolvedTarget) -> types_pb2.ResolvedTarget:
    return types_pb2.ResolvedTarget(
        token_id=target.token_id,
        token=target.token,
        logit=target.logit,
        position=target.target.terms[0].position,
        contrast_id=target.target.contrast_id,
        contrast=target.contrast,
        logprob=target.target.logprob,
        continuation_ids=target.target.continuation_ids,
        candidates=[
            types_pb2.Candidate(
                token_id=candidate.token_id,
                token=candidate.token,
                logit=candidate.logit,
                probability=candidate.probability,
            )
            for candidate in target.candidates
        ],
    )


def failed(
    job_id: str, attempt: int, code: int, message: str, violations: tuple[Violation, ...] = ()
) -> worker_pb2.LeasedChunk:
    """Write the only chunk of a job that failed."""
    return worker_pb2.LeasedChunk(
        attempt=attempt,
        chunk=types_pb2.ResultChunk(
            job_id=job_id,
            number=1,
            end=types_pb2.JobEnd(
                state=types_pb2.JOB_STATE_FAILED,
                attempt=attempt,
                error=types_pb2.JobError(
                    code=code,
                    message=message,
                    violations=[
                        types_pb2.FieldViolation(field=v.field, description=v.description)
                        for v in violations
                    ],
                ),
            ),
        ),
    )


def cast(tensor: SiteTensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring a tensor into the format that the job wants.

    Raises
    ------
    InvalidJob
        A value is too large for float16.
    """
    if not tensor.values.is_floating_point():
        return tensor.values
    values = tensor.values.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(values).all()):
        largest = float(tensor.values.abs().max())
        raise InvalidJob(
            [
                Violation(
                    "dtype",
                    f"float16 ends at 65504 and site {tensor.site!r} reaches {largest:.3g}; "
                    "ask for float32 or bfloat16",
                )
            ]
        )
    return values


def raw_bytes(values: torch.Tensor) -> memoryview:
    """View a CPU tensor as little-endian bytes in row-major order."""
    flat = values.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


INVALID_ARGUMENT = code_pb2.INVALID_ARGUMENT
INTERNAL = code_pb2.INTERNAL
