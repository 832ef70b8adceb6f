"""Writes tokens after prompts: a batch with a cache of keys and values, edits in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from reltrace_worker.engine.edits import Edits, Rows
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import GenerateJob, Sampling
from reltrace_worker.types.results import GeneratedText


@dataclass(slots=True)
class Text:
    """One job's text, as far as it is written.

    Parameters
    ----------
    job
        With a `generation`.
    """

    job: GenerateJob
    source: torch.Generator = field(init=False)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    fault: EngineError | None = None
    """Why it can not go on."""

    def __post_init__(self) -> None:
        self.source = torch.Generator().manual_seed(self.spec.seed)

    @property
    def spec(self) -> Sampling:
        """How it is written."""
        return self.job.sampling

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what is written after it."""
        return [*self.job.token_ids, *self.ids]

    @property
    def over(self) -> bool:
        """Nothing is written after it any more."""
        return self.stopped or self.fault is not None or len(self.ids) == self.spec.max_new_tokens

    def go_on(self, token: int, logprob: float, ends: frozenset[int]) -> None:
        """Take the next token, unless the text is over."""
        if self.over:
            return
        if not math.isfinite(logprob):
            self.fault = EngineError(
                f"the logits of token {len(self.ids)} of the text are not finite: the model's "
                "weights or activations, or its edits, overflow"
            )
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.stopped = token in ends

    def written(self, vocabulary: Vocabulary) -> GeneratedText:
        """Return what is written."""
        return GeneratedText(
            token_ids=tuple(self.ids),
            tokens=vocabulary.texts(self.ids),
            text=vocabulary.decoded(self.ids),
            logprobs=tuple(self.logprobs),
            stopped=self.stopped,
        )


def draw(
    logits: torch.Tensor, specs: Sequence[Sampling], sources: Sequence[torch.Generator]
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
    texts
        As far as they are written; shorter ones are padded on their left. What is written of one
        does not depend on the others, but for rounding.
    """

    def __init__(self, loaded: LoadedModel, texts: Sequence[Text]) -> None:
        self._loaded = loaded
        self._texts = list(texts)
        self._ends = end_tokens(loaded)
        tokens = [text.tokens for text in texts]
        self._places = [len(ids) for ids in tokens]
        longest = max(self._places)
        pads = [longest - length for length in self._places]
        device = loaded.device
        self._mask = torch.tensor(
            [[0] * pad + [1] * (longest - pad) for pad in pads], device=device
        )
        self._ids = torch.tensor(
            [[0] * pad + ids for pad, ids in zip(pads, tokens, strict=True)], device=device
        )
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=loaded.model.config)
        self._edits = Edits(
            loaded,
            [
                Rows(text.job.edits, row * longest + pad, range(longest - pad))
                for row, (text, pad) in enumerate(zip(texts, pads, strict=True))
            ],
        )

    @property
    def over(self) -> bool:
        """All texts have ended."""
        return all(text.over for text in self._texts)

    def go_on(self, tokens: int, wrote: Callable[[], None] | None = None) -> None:
        """Write at most so many further tokens of each text; call `wrote` after each."""
        with torch.no_grad(), self._edits.attached():
            for _ in range(tokens):
                if self.over:
                    return
                self._leave_out_what_is_over()
                self._next(self._logits())
                if wrote is not None:
                    wrote()

    def _leave_out_what_is_over(self) -> None:
        """Go on with the others alone, where they are half of the batch at most."""
        rows = [row for row, text in enumerate(self._texts) if not text.over]
        if 2 * len(rows) > len(self._texts) or not self._cache.get_seq_length():
            return
        # On the CPU: a cache may be on several devices.
        kept = torch.tensor(rows)
        self._texts = [self._texts[row] for row in rows]
        self._places = [self._places[row] for row in rows]
        self._ids, self._mask = self._ids[kept], self._mask[kept]
        self._positions = self._positions[kept]
        self._cache.batch_select_indices(kept)
        self._place_edits()

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
        # One text's overflow is not its neighbours': it goes on with anything, and counts no more.
        broken = ~logits.isfinite().all(-1)
        logits = logits.masked_fill(broken[:, None], 0.0)
        tokens = draw(logits, [t.spec for t in self._texts], [t.source for t in self._texts])
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs = logprobs.masked_fill(broken, math.nan)
        # In one transfer: float64 holds both as they are.
        chosen = torch.stack((tokens.double(), logprobs.double())).tolist()
        for text, token, logprob in zip(self._texts, *chosen, strict=True):
            text.go_on(int(token), logprob, self._ends)
        self._ids = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        self._places = [place + 1 for place in self._places]
        self._place_edits()

    def _place_edits(self) -> None:
        """Let edits be made of the one token of each text that comes next."""
        self._edits.move(
            [
                Rows(text.job.edits, row, range(place - 1, place))
                for row, (text, place) in enumerate(zip(self._texts, self._places, strict=True))
            ]
        )


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text: those of the generation config, and the tokenizer's EOS.

    Both, as other servers have it: a chat template ends turns with the tokenizer's.
    """
    config = getattr(loaded.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = set(found if isinstance(found, list | tuple) else [found])
    return frozenset((ends | {loaded.tokenizer.eos_token_id}) - {None})
