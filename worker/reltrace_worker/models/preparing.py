"""Checks a job against the model and tokenizes it: every fault is found before a pass runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from reltrace_worker.models.corpus import prepare_corpus
from reltrace_worker.models.editing import EditChecker, SiteExtent
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.prompts import PromptReader, Reading
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import Faults
from reltrace_worker.types.jobs import (
    GenerationSpec,
    JobSpec,
    PreparedCorpus,
    PreparedJob,
    PreparedTarget,
    TargetSpec,
    Term,
)

MAX_TOP_K = 4096
"""Most values per layer that the reduction ``topk`` gives."""

MAX_NEW_TOKENS = 1024
"""Most tokens that one job writes."""

MAX_TEMPERATURE = 100.0
"""From about there on, every token is as likely as any other."""


class JobPreparer:
    """Turns what clients ask for into what the engine runs.

    Parameters
    ----------
    loaded
        The model that the jobs are for.
    sites
        Those that the engine knows, by name.
    reductions, rules
        The names that it knows.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        sites: Mapping[str, SiteExtent],
        reductions: Collection[str],
        rules: Collection[str],
    ) -> None:
        self._prompts = PromptReader(loaded)
        self._special = Vocabulary(loaded.tokenizer).special_ids
        self._context_length = loaded.context_length
        self._layers = loaded.shape.layers
        self._sites = tuple(sites)
        self._reductions = tuple(reductions)
        self._rules = tuple(rules)
        self._edits = EditChecker(loaded.shape, sites)

    def prepare(self, spec: JobSpec) -> PreparedJob:
        """Check and tokenize one job.

        Parameters
        ----------
        spec
            What the client asked for.

        Returns
        -------
        PreparedJob
            Ready for ``Engine.run``.

        Raises
        ------
        InvalidJob
            Carries every fault, each with the path of the field and what is allowed.
        """
        faults = Faults()
        if spec.generation is not None:
            return self._prepare_writing(spec, spec.generation, faults)
        if not spec.tokenize_only:
            self._check_names(spec, faults)
            self._check_extent(spec, faults)
            if not spec.targets:
                faults.add("targets", "is empty; leave it out for the largest logit")
        reading = self._prompts.read(spec, faults)
        if spec.tokenize_only:
            faults.raise_any()
            return reading.job
        targets: list[PreparedTarget] = []
        for index, target in enumerate(spec.targets):
            targets += self._target(target, f"targets[{index}]", reading, faults)
        edits = self._edits.prepare(spec.edits, reading.length, faults.add)
        faults.raise_any()
        return replace(
            reading.job,
            sites=spec.sites,
            reduction=spec.reduction,
            rule=spec.rule,
            targets=tuple(targets),
            layers=spec.layers,
            k=spec.k,
            edits=edits,
            forward_only=spec.forward_only,
        )

    def prepare_corpus(self, spec: JobSpec) -> PreparedCorpus:
        """Check and tokenize the prompts of an atlas; what can not be traced is left out.

        Raises
        ------
        InvalidJob
            Of what the prompts share, something is wrong, or none of them can be traced.
        """
        return prepare_corpus(spec, self.prepare, self._rules, self._special)

    def _prepare_writing(
        self, spec: JobSpec, generation: GenerationSpec, faults: Faults
    ) -> PreparedJob:
        """Check a job that writes: prompt, edits, and how it draws."""
        reading = self._prompts.read(replace(spec, targets=()), faults)
        prompt = reading.job.token_ids
        most = generation.max_new_tokens
        field = "generation.max_new_tokens"
        if not 1 <= most <= MAX_NEW_TOKENS:
            faults.add(field, f"is {most}; allowed: 1 to {MAX_NEW_TOKENS}")
        elif prompt and len(prompt) + most > self._context_length >= len(prompt):
            faults.add(
                field,
                f"is {most} after a prompt of {len(prompt)} tokens; the model's context holds "
                f"{self._context_length} together",
            )
        if not 0 <= generation.temperature <= MAX_TEMPERATURE:
            faults.add(
                "generation.temperature",
                f"is {generation.temperature}; allowed: 0 to {MAX_TEMPERATURE:.0f}",
            )
        if not 0 <= generation.top_p <= 1:
            faults.add("generation.top_p", f"is {generation.top_p}; allowed: 0 to 1")
        edits = self._edits.prepare(spec.edits, len(prompt), faults.add)
        faults.raise_any()
        return replace(reading.job, edits=edits, generation=generation)

    def _check_names(self, spec: JobSpec, faults: Faults) -> None:
        if spec.forward_only and spec.sites:
            faults.add("sites", "needs a backward pass, and the job has none (forward_only)")
        elif not spec.sites and not spec.forward_only:
            faults.add("sites", f"is empty; allowed: {', '.join(self._sites)}")
        for index, site in enumerate(spec.sites):
            if site not in self._sites:
                faults.add(f"sites[{index}]", _unknown("site", site, self._sites))
            elif site in spec.sites[:index]:
                faults.add(f"sites[{index}]", f"site {site!r} is named twice")
        if spec.reduction not in self._reductions:
            faults.add("reduction", _unknown("reduction", spec.reduction, self._reductions))
        if spec.rule not in self._rules:
            faults.add("rule", _unknown("rule", spec.rule, self._rules))

    def _check_extent(self, spec: JobSpec, faults: Faults) -> None:
        """Check which layers, and how many values of each, a job asks for."""
        for index, layer in enumerate(spec.layers):
            if not 0 <= layer < self._layers:
                faults.add(
                    f"layers[{index}]",
                    f"layer {layer} does not exist; allowed: 0 to {self._layers - 1}",
                )
            elif layer in spec.layers[:index]:
                faults.add(f"layers[{index}]", f"layer {layer} is named twice")
        if spec.reduction == "topk" and not 1 <= spec.k <= MAX_TOP_K:
            faults.add(
                "top_k",
                f"is {spec.k}; with the reduction 'topk', allowed: 1 to {MAX_TOP_K}",
            )
        elif spec.reduction != "topk" and spec.k:
            faults.add("top_k", f"is for the reduction 'topk', not {spec.reduction!r}")

    def _target(
        self,
        target: TargetSpec,
        field: str,
        reading: Reading,
        faults: Faults,
    ) -> list[PreparedTarget]:
        if target.continuation is not None:
            return self._continuation_targets(target, field, reading, faults)
        if target.each:
            faults.add(f"{field}.each", "is for a continuation, and there is none")
        position, prompt_length = target.position, reading.length
        if prompt_length and not -prompt_length <= position < prompt_length:
            faults.add(
                f"{field}.position",
                f"position {position} is outside the prompt of {prompt_length} tokens; allowed: "
                f"{-prompt_length} to {prompt_length - 1}",
            )
        absolute = position % prompt_length if prompt_length else 0
        token_id = self._prompts.token(
            target.token,
            f"{field}.token",
            reading,
            faults,
            # Which excludes both, and of which a job has one.
            continues=target.contrast is None and position == -1 and not reading.continuation,
        )
        contrast_id = self._prompts.token(
            target.contrast, f"{field}.contrast", reading, faults, continues=False
        )
        if contrast_id is not None and contrast_id == token_id:
            faults.add(f"{field}.contrast", "is the token itself: the difference is always zero")
        terms = [Term(absolute, token_id)]
        if contrast_id is not None:
            terms.append(Term(absolute, contrast_id, -1.0))
        return [PreparedTarget(tuple(terms), contrast_id, target.logprob)]

    def _continuation_targets(
        self,
        target: TargetSpec,
        field: str,
        reading: Reading,
        faults: Faults,
    ) -> list[PreparedTarget]:
        exclusive = {
            "token": target.token is not None,
            "position": target.position != -1,
            "contrast": target.contrast is not None,
        }
        for name, given in exclusive.items():
            if given:
                faults.add(f"{field}.{name}", "excludes a continuation; give one of the two")
        continuation = reading.continuation
        # The logits of a response token are read one position before it.
        terms = [Term(reading.length - 1 + i, token) for i, token in enumerate(continuation)]
        if not target.each:
            return [
                PreparedTarget(tuple(terms), logprob=target.logprob, continuation_ids=continuation)
            ]
        return [
            PreparedTarget((term,), logprob=target.logprob, continuation_ids=(token,))
            for term, token in zip(terms, continuation, strict=True)
        ]


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> str:
    return f"{kind} {name!r} is unknown; allowed: {', '.join(known)}"
