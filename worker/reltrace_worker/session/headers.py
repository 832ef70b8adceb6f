"""Writes what a worker announces, and everything of a result but its tensors."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

from reltrace_proto.v1 import types_pb2

from reltrace_worker.engine import REDUCTIONS, SITES
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel
from reltrace_worker.session.requests import CAPABILITIES
from reltrace_worker.session.tensors import scalar_type
from reltrace_worker.types.jobs import AtlasJob, TokenizedPrompt
from reltrace_worker.types.results import GeneratedText, ResolvedTarget


def model_info(loaded: LoadedModel) -> types_pb2.ModelInfo:
    """Return what a worker announces of its model, and of what it can do with it."""
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
        parameters=loaded.parameters,
        dtype=scalar_type(loaded.dtype),
        sites=SITES,
        rules=RULES,
        reductions=REDUCTIONS,
        capabilities=CAPABILITIES,
    )


def prompt_header(
    prompt: TokenizedPrompt,
    provenance: types_pb2.Provenance,
    layers: Sequence[int],
    targets: Sequence[ResolvedTarget] = (),
    hints: Sequence[str] = (),
) -> types_pb2.TraceHeader:
    """Return the header of a result whose tensors have these layers."""
    return types_pb2.TraceHeader(
        token_ids=prompt.token_ids,
        tokens=prompt.tokens,
        targets=map(_resolved, targets),
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


def atlas_header(
    atlas: AtlasJob,
    targets: Sequence[ResolvedTarget],
    provenance: types_pb2.Provenance,
    layers: Sequence[int],
) -> types_pb2.TraceHeader:
    """Return the header of an atlas; its tokens are those of prompts and targets, each once."""
    vocabulary = {target.token_id: target.token for target in targets}
    for job in atlas.prompts:
        vocabulary.update(zip(job.token_ids, job.prompt.tokens, strict=True))
    vocabulary = dict(sorted(vocabulary.items()))
    return types_pb2.TraceHeader(
        token_ids=vocabulary.keys(),
        tokens=vocabulary.values(),
        provenance=provenance,
        layers=layers,
        special_positions=[i for i, token in enumerate(vocabulary) if token in atlas.special],
        skipped=[
            types_pb2.FieldViolation(field=f"corpus.prompts[{number}]", description=why)
            for number, why in atlas.skipped
        ],
    )


def generated_text(text: GeneratedText) -> types_pb2.Generated:
    # The fields have the same names.
    return types_pb2.Generated(**asdict(text))


def _resolved(resolved: ResolvedTarget) -> types_pb2.ResolvedTarget:
    target = resolved.target
    return types_pb2.ResolvedTarget(
        token_id=resolved.token_id,
        token=resolved.token,
        logit=resolved.logit,
        position=target.terms[0].position,
        contrast_id=target.contrast_id,
        contrast=resolved.contrast,
        logprob=target.logprob,
        continuation_ids=target.continuation_ids,
        candidates=[
            types_pb2.Candidate(
                token_id=candidate.token_id,
                token=candidate.token,
                logit=candidate.logit,
                probability=candidate.probability,
            )
            for candidate in resolved.candidates
        ],
    )
