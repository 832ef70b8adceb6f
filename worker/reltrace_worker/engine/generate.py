"""Writes tokens after prompts: a batch with a cache of keys and values, edits in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from reltrace_worker.engine.edits import Edits, Rows
from reltrace_worker.jobs import GenerationSpec, PreparedJob, Written
from reltrace_worker.model.loading import LoadedModel
from reltrace_worker.model.vocabulary import Vocabulary


@dataclass(slots=True)
class _Text:
    """One job's text, as far as it is written."""

    job: PreparedJob
    spec: GenerationSpec
    source: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def over(self) -> bool:
        return self.stopped or len(self.ids) == self.spec.max_new_tokens

    def go_on(self, token: int, logprob: float, ends: frozenset[int]) -> None:
        """Take the next token, unless the text is over."""
        if not self.over:
            self.ids.append(token)
            self.logprobs.append(logprob)
            self.stopped = token in ends


def draw(
    logits: torch.Tensor, specs: Sequence[GenerationSpec], sources: Sequence[torch.Generator]
) -> torch.Tensor:
    """Choose the next token of each text.

    Parameters
    ----------
    logits
        float32 [B, vocabulary].
    specs
        How, one per text.
    sources
        Of the CPU, one per text: gives one number per token that is sampled, whatever the batch.

    Returns
    -------
    torch.Tensor
        int64 [B], on the device of the logits.
    """
    tokens = logits.argmax(-1)
    sampled = [row for row, spec in enumerate(specs) if spec.temperature != 0]
    if not sampled:
        return tokens

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    rows = torch.tensor(sampled, device=logits.device)
    heat = column([specs[row].temperature for row in sampled])
    chances, order = (logits[rows] / heat).softmax(-1).sort(dim=-1, descending=True, stable=True)
    through = chances.cumsum(-1)
    # The token that passes the bound is still among them (Holtzman et al., 2020).
    bounds = column([specs[row].top_p or math.inf for row in sampled])
    last = (through - chances < bounds).sum(-1, keepdim=True) - 1
    random = [torch.rand((), generator=sources[row], dtype=torch.float64) for row in sampled]
    at = column([float(number) for number in random]) * through.gather(-1, last)
    places = torch.searchsorted(through, at, right=True).minimum(last)
    return tokens.index_copy(0, rows, order.gather(-1, places)[:, 0])


class Writing:
    """Texts that are written together, some tokens at a time.

    Parameters
    ----------
    loaded
        The model, plain: no rule is applied.
    jobs
        All with a `generation`; shorter prompts are padded on their left. What a job writes does
        not depend on the others, but for rounding.
    """

    def __init__(self, loaded: LoadedModel, jobs: Sequence[PreparedJob]) -> None:
        self._loaded = loaded
        self._jobs = list(jobs)
        self._texts = [
            _Text(job, job.generation, torch.Generator().manual_seed(job.generation.seed))
            for job in jobs
            if job.generation is not None
        ]
        assert len(self._texts) == len(jobs)
        self._ends = end_tokens(loaded)
        longest = max(len(job.token_ids) for job in jobs)
        pads = [longest - len(job.token_ids) for job in jobs]
        device = loaded.device
        self._mask = torch.tensor(
            [[0] * pad + [1] * (longest - pad) for pad in pads], device=device
        )
        self._ids = torch.tensor(
            [[0] * pad + list(job.token_ids) for pad, job in zip(pads, jobs, strict=True)],
            device=device,
        )
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=loaded.model.config)
        self._places = [len(job.token_ids) for job in jobs]
        self._edits = Edits(
            loaded,
            [
                Rows(job.edits, row * longest + pad, range(longest - pad))
                for row, (job, pad) in enumerate(zip(jobs, pads, strict=True))
            ],
        )

    @property
    def over(self) -> bool:
        """All texts have ended."""
        return all(text.over for text in self._texts)

    def drop(self, job: int) -> None:
        """Write no more of a job that nobody waits for."""
        self._texts[job].stopped = True

    def token_ids(self, job: int) -> list[int]:
        """Return what is written of a job."""
        return list(self._texts[job].ids)

    def go_on(self, tokens: int, wrote: Callable[[], None] | None = None) -> None:
        """Write at most so many further tokens of each text; call `wrote` after each."""
        with torch.no_grad(), self._edits.attached():
            for _ in range(tokens):
                if self.over:
                    return
                self._next(self._logits())
                if wrote is not None:
                    wrote()

    def _logits(self) -> torch.Tensor:
        """Run the model over the tokens that come next; return the logits of the last, [B, V]."""
        model = self._loaded.model
        output: Any = model(
            inputs_embeds=self._edits.embedded(model.get_input_embeddings()(self._ids)),
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _next(self, logits: torch.Tensor) -> None:
        specs, sources = [t.spec for t in self._texts], [t.source for t in self._texts]
        tokens = draw(logits, specs, sources)
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        # In one transfer: float64 holds both as they are.
        chosen = torch.stack((tokens.double(), logprobs.double())).tolist()
        for text, token, logprob in zip(self._texts, *chosen, strict=True):
            text.go_on(int(token), logprob, self._ends)
        self._ids = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        self._edits.move(
            [
                Rows(job.edits, row, range(place, place + 1))
                for row, (job, place) in enumerate(zip(self._jobs, self._places, strict=True))
            ]
        )
        self._places = [place + 1 for place in self._places]

    def written(self) -> list[Written]:
        """Return what is written, one per job, in order."""
        vocabulary = Vocabulary(self._loaded.tokenizer)
        return [_written(text, vocabulary) for text in self._texts]


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text, by the checkpoint's own word."""
    config = getattr(loaded.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = loaded.tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])


def _written(text: _Text, vocabulary: Vocabulary) -> Written:
    return Written(
        token_ids=tuple(text.ids),
        tokens=vocabulary.texts(text.ids),
        text=vocabulary.decoded(text.ids),
        logprobs=tuple(text.logprobs),
        stopped=text.stopped,
    )
