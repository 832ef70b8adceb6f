"""Writes tokens after prompts: a batch with a cache of keys and values, edits in place."""

from __future__ import annotations

from collections.abc import Sequence
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

    def go_on(self, logits: torch.Tensor, ends: frozenset[int]) -> int:
        """Take the logits of the next token, float32 [vocabulary]; return the token."""
        token = draw(logits, self.spec, self.source)
        if not self.over:
            self.ids.append(token)
            self.logprobs.append(float(logits[token] - logits.logsumexp(-1)))
            self.stopped = token in ends
        return token


def draw(logits: torch.Tensor, spec: GenerationSpec, source: torch.Generator) -> int:
    """Choose the next token.

    Parameters
    ----------
    logits
        float32 [vocabulary], on the CPU.
    spec
        How.
    source
        Gives one number per token, whatever the batch.
    """
    if spec.temperature == 0:
        return int(logits.argmax())
    chances = (logits.double() / spec.temperature).softmax(-1)
    chances, order = chances.sort(descending=True, stable=True)
    through = chances.cumsum(0)
    if spec.top_p:
        # The token that passes the bound is still among them (Holtzman et al., 2020).
        kept = int((through - chances < spec.top_p).sum())
        through = through[:kept]
    at = torch.rand((), generator=source, dtype=torch.float64) * through[-1]
    return int(order[min(int(torch.searchsorted(through, at, right=True)), len(through) - 1)])


def generate(loaded: LoadedModel, jobs: Sequence[PreparedJob]) -> list[Written]:
    """Write after every prompt until all have ended.

    Parameters
    ----------
    loaded
        The model, plain: no rule is applied.
    jobs
        All with a `generation`; shorter prompts are padded on their left.

    Returns
    -------
    list[Written]
        One per job, in order. What a job writes does not depend on the others, but for rounding.
    """
    texts = [
        _Text(job, job.generation, torch.Generator().manual_seed(job.generation.seed))
        for job in jobs
        if job.generation is not None
    ]
    assert len(texts) == len(jobs)
    ends, vocabulary = end_tokens(loaded), Vocabulary(loaded.tokenizer)
    longest = max(len(job.token_ids) for job in jobs)
    pads = [longest - len(job.token_ids) for job in jobs]
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=loaded.device)
    ids = torch.tensor(
        [[0] * pad + list(job.token_ids) for pad, job in zip(pads, jobs, strict=True)],
        device=loaded.device,
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    edits = Edits(
        loaded,
        [
            Rows(job.edits, row * longest + pad, range(longest - pad))
            for row, (job, pad) in enumerate(zip(jobs, pads, strict=True))
        ],
    )
    cache = DynamicCache(config=loaded.model.config)
    with torch.no_grad(), edits.attached():
        while True:
            logits = _step(loaded, edits, ids, mask, positions, cache)
            chosen = [text.go_on(row, ends) for text, row in zip(texts, logits, strict=True)]
            if all(text.over for text in texts):
                break
            ids = torch.tensor(chosen, device=loaded.device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(jobs), 1)], 1)
            positions = positions[:, -1:] + 1
            edits.move(
                [
                    Rows(job.edits, row, range(position, position + 1))
                    for row, (job, position) in enumerate(
                        zip(jobs, positions[:, 0].tolist(), strict=True)
                    )
                ]
            )
    return [_written(text, vocabulary, loaded.tokenizer) for text in texts]


def _step(
    loaded: LoadedModel,
    edits: Edits,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Run the model over tokens that come next, [B, S]; return the logits of the last, [B, V]."""
    embeddings = edits.embedded(loaded.model.get_input_embeddings()(ids))
    output: Any = loaded.model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1].float().cpu()
    return logits


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text, by the checkpoint's own word."""
    config = getattr(loaded.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = loaded.tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])


def _written(text: _Text, vocabulary: Vocabulary, tokenizer: Any) -> Written:
    return Written(
        token_ids=tuple(text.ids),
        tokens=vocabulary.texts(text.ids),
        text=tokenizer.decode(
            text.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        logprobs=tuple(text.logprobs),
        stopped=text.stopped,
    )
