"""Checks requests against the model and tokenizes them: every fault is found before a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from reltrace_worker.engine.checks import check_edits, check_layer, check_name, check_position
from reltrace_worker.engine.corpus import prepare_atlas
from reltrace_worker.engine.reductions import REDUCTIONS
from reltrace_worker.engine.sites import SITES
from reltrace_worker.lrp import RULES
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.prompts import PromptReader, Reading
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import Faults
from reltrace_worker.types.jobs import (
    AtlasJob,
    AtlasRequest,
    GenerateJob,
    GenerateRequest,
    Job,
    Request,
    Sampling,
    Target,
    TargetRequest,
    Term,
    TokenizedPrompt,
    TokenizeRequest,
    TraceJob,
    TraceRequest,
)

MAX_TOP_K = 4096
"""Most values per layer that the reduction ``topk`` gives."""

MAX_NEW_TOKENS = 1024

ROWS_PER_READING = {"cpu": 64, "cuda": 512}
"""About how many rows a pass computes in the time in which it reads the weights once."""

MAX_TEMPERATURE = 100.0
"""From about there on, every token is as likely as any other."""


class JobPreparer:
    """Turns requests for one model into jobs; tells `on_step` before each prompt of an atlas."""

    def __init__(self, loaded: LoadedModel, on_step: Callable[[], None] = lambda: None) -> None:
        self._on_step = on_step
        self._prompts = PromptReader(loaded)
        self._special = Vocabulary(loaded.tokenizer).special_ids
        self._context_length = loaded.context_length
        self._shape = loaded.shape
        self._rows_per_reading = ROWS_PER_READING[loaded.device.type]

    @overload
    def prepare(self, request: TraceRequest) -> TraceJob: ...
    @overload
    def prepare(self, request: GenerateRequest) -> GenerateJob: ...
    @overload
    def prepare(self, request: AtlasRequest) -> AtlasJob: ...
    @overload
    def prepare(self, request: TokenizeRequest) -> TokenizedPrompt: ...
    @overload
    def prepare(self, request: Request) -> Job | TokenizedPrompt: ...
    def prepare(self, request: Request) -> Job | TokenizedPrompt:
        """Check and tokenize a request.

        Raises `InvalidJob`: carries every fault, each with the path of the field and what
        is allowed.
        """
        match request:
            case TraceRequest():
                return self._trace(request)
            case GenerateRequest():
                return self._generation(request)
            case AtlasRequest():
                return prepare_atlas(request, self._trace_in_atlas, self._special)
        faults = Faults()
        reading = self._prompts.read(request.input, request.add_special_tokens, (), faults)
        faults.raise_any()
        return reading.prompt

    def _trace_in_atlas(self, request: TraceRequest) -> TraceJob:
        self._on_step()
        return self._trace(request)

    def _trace(self, request: TraceRequest) -> TraceJob:
        faults = Faults()
        self._check_names(request, faults)
        self._check_layers(request, faults)
        if not request.targets:
            faults.add("targets", "is empty; leave it out for the largest logit")
        reading = self._prompts.read(
            request.input, request.add_special_tokens, request.targets, faults
        )
        targets: list[Target] = []
        for index, target in enumerate(request.targets):
            targets += self._targets(target, f"targets[{index}]", reading, faults)
        edits = check_edits(request.edits, self._shape, reading.length, faults)
        faults.raise_any()
        return TraceJob(
            reading.prompt,
            tuple(targets),
            request.sites,
            request.reduction,
            request.rule,
            request.layers,
            request.k,
            edits,
            packs_targets=self._packs(len(reading.prompt.token_ids), len(targets)),
        )

    def _packs(self, tokens: int, targets: int) -> bool:
        """Whether a prompt is packed once for each target.

        N rows take a + b * N seconds, forward or backward. As copies in a full pack, T targets take
        2 * b * N * T; with one forward pass and T backward passes, (1 + T) * (a + b * N).
        """
        return tokens * (targets - 1) <= self._rows_per_reading * (targets + 1)

    def _generation(self, request: GenerateRequest) -> GenerateJob:
        faults = Faults()
        reading = self._prompts.read(request.input, request.add_special_tokens, (), faults)
        self._check_sampling(request.sampling, len(reading.prompt.token_ids), faults)
        edits = check_edits(request.edits, self._shape, len(reading.prompt.token_ids), faults)
        faults.raise_any()
        return GenerateJob(reading.prompt, request.sampling, edits)

    def _check_sampling(self, sampling: Sampling, prompt_length: int, faults: Faults) -> None:
        most, context = sampling.max_new_tokens, self._context_length
        if not 1 <= most <= MAX_NEW_TOKENS:
            faults.add("generation.max_new_tokens", f"is {most}; allowed: 1 to {MAX_NEW_TOKENS}")
        elif prompt_length and prompt_length + most > context >= prompt_length:
            what = (
                f"is {most} after a prompt of {prompt_length} tokens; the model's context holds "
                f"{context} together"
            )
            faults.add("generation.max_new_tokens", what)
        temperature, top_p = sampling.temperature, sampling.top_p
        what = f"is {temperature}; allowed: 0 to {MAX_TEMPERATURE:.0f}"
        faults.require(0 <= temperature <= MAX_TEMPERATURE, "generation.temperature", what)
        faults.require(0 <= top_p <= 1, "generation.top_p", f"is {top_p}; allowed: 0 to 1")

    def _check_names(self, request: TraceRequest, faults: Faults) -> None:
        for index, site in enumerate(request.sites):
            if check_name("site", site, SITES, f"sites[{index}]", faults):
                once = site not in request.sites[:index]
                faults.require(once, f"sites[{index}]", f"site {site!r} is named twice")
        check_name("reduction", request.reduction, REDUCTIONS, "reduction", faults)
        check_name("rule", request.rule, RULES, "rule", faults)

    def _check_layers(self, request: TraceRequest, faults: Faults) -> None:
        for index, layer in enumerate(request.layers):
            check_layer(layer, self._shape.layers, f"layers[{index}]", faults)
            once = layer not in request.layers[:index]
            faults.require(once, f"layers[{index}]", f"layer {layer} is named twice")
        if request.reduction == "topk":
            what = f"is {request.k}; with the reduction 'topk', allowed: 1 to {MAX_TOP_K}"
            faults.require(1 <= request.k <= MAX_TOP_K, "top_k", what)
        else:
            what = f"is for the reduction 'topk', not {request.reduction!r}"
            faults.require(not request.k, "top_k", what)

    def _targets(
        self, target: TargetRequest, field: str, reading: Reading, faults: Faults
    ) -> list[Target]:
        """Return one target, or one for each token of a continuation."""
        if target.continuation is not None:
            return _continuation_targets(target, field, reading, faults)
        if target.each:
            faults.add(f"{field}.each", "is for a continuation, and there is none")
        position = target.position
        check_position(position, reading.length, f"{field}.position", faults)
        absolute = position % reading.length if reading.length else 0
        token_id = self._prompts.token(
            target.token,
            f"{field}.token",
            reading,
            faults,
            # The message may advise a continuation, which excludes both; a job has only one.
            continues=target.contrast is None and position == -1 and not reading.continuation,
        )
        contrast_id = self._prompts.token(
            target.contrast, f"{field}.contrast", reading, faults, continues=False
        )
        if contrast_id is None:
            return [Target((Term(absolute, token_id),), logprob=target.logprob, field=field)]
        if contrast_id == token_id:
            faults.add(f"{field}.contrast", "is the token itself: the difference is always zero")
        terms = (Term(absolute, token_id), Term(absolute, contrast_id, -1.0))
        return [Target(terms, contrast_id, target.logprob, field=field)]


def _continuation_targets(
    target: TargetRequest, field: str, reading: Reading, faults: Faults
) -> list[Target]:
    default = TargetRequest()
    for name in ("token", "position", "contrast"):
        if getattr(target, name) != getattr(default, name):
            faults.add(f"{field}.{name}", "excludes a continuation; give one of the two")
    # The logits of a response token are read one position before it.
    terms = [Term(reading.length - 1 + i, token) for i, token in enumerate(reading.continuation)]
    if not target.each:
        return [Target(tuple(terms), None, target.logprob, reading.continuation, field)]
    return [
        Target((term,), None, target.logprob, (token,), field)
        for term, token in zip(terms, reading.continuation, strict=True)
    ]
