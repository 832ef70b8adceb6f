"""Decodes sequences together, token by token, with a cache of keys and values, edits in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reltrace_worker.engine.edits import EditedRows, EditHooks
from reltrace_worker.engine.kv_cache import RowsCache
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.rope import longrope_limit
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import GenerateJob, Sampling
from reltrace_worker.types.results import GeneratedText, JobResult, Outcome

PROMPT_TOKENS = 512
"""Tokens of prompts, padding included, that go through the model at a time: so long do the texts
wait that are being generated meanwhile. Fewer are slower per token."""


@dataclass(slots=True, eq=False)
class GeneratedSequence:
    """The tokens of one job so far."""

    job: GenerateJob
    random: torch.Generator = field(init=False)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    error: EngineError | None = None
    # Tokens that went through the model for it, those of the prompt included; of them, those that
    # were accounted for.
    computed: int = 0
    counted: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.job.sampling.seed)

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what is generated after it."""
        return [*self.job.token_ids, *self.ids]

    @property
    def length(self) -> int:
        return len(self.job.token_ids) + len(self.ids)

    @property
    def finished(self) -> bool:
        full = len(self.ids) == self.job.sampling.max_new_tokens
        return self.stopped or self.error is not None or full

    def append(self, token: int, logprob: float, end_tokens: frozenset[int]) -> None:
        """Take the next token, unless the sequence is finished."""
        if self.finished:
            return
        if not math.isfinite(logprob):
            self.error = EngineError(
                f"the logits of token {len(self.ids)} of the text are not finite: the model's "
                "weights or activations, or its edits, overflow"
            )
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.stopped = token in end_tokens

    def outcome(self, vocabulary: Vocabulary) -> Outcome:
        return self.error or JobResult(
            generated=GeneratedText(
                token_ids=tuple(self.ids),
                tokens=vocabulary.texts(self.ids),
                text=vocabulary.decoded(self.ids),
                logprobs=tuple(self.logprobs),
                stopped=self.stopped,
            )
        )


def sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], random: Sequence[torch.Generator]
) -> torch.Tensor:
    """Choose the next token of each sequence: int64 [B], from float32 [B, vocabulary].

    A generator, on the CPU, gives one number per token that is sampled, whatever the batch.
    """
    tokens = logits.argmax(-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature != 0]
    if not sampled:
        return tokens

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    rows = torch.tensor(sampled, device=logits.device)
    temperatures = column([samplings[row].temperature for row in sampled])
    scaled = (logits[rows] / temperatures).softmax(-1)
    probabilities, order = scaled.sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # The token that passes the bound is still among them (Holtzman et al., 2020).
    bounds = column([samplings[row].top_p or math.inf for row in sampled])
    last = (cumulative - probabilities < bounds).sum(-1, keepdim=True) - 1
    numbers = [torch.rand((), generator=random[row], dtype=torch.float64) for row in sampled]
    drawn = column([float(number) for number in numbers]) * cumulative.gather(-1, last)
    ranks = torch.searchsorted(cumulative, drawn, right=True).minimum(last)
    return tokens.index_copy(0, rows, order.gather(-1, ranks)[:, 0])


class DecodeBatch:
    """Sequences that are decoded together, on the plain model: no rule is applied.

    Shorter ones are padded on their left. What is generated of one does not depend on the others,
    but for rounding.
    """

    def __init__(self, loaded: LoadedModel, sequences: Sequence[GeneratedSequence]) -> None:
        self._loaded = loaded
        self._end_tokens = end_tokens(loaded)
        self._longrope_limit = longrope_limit(loaded.model.config)
        self._edits = EditHooks(loaded, [])
        self.sequences = list(sequences)
        # Whether the prompts have not been read to their ends.
        self.reads = True
        self.cache = RowsCache(loaded.model.config)
        tokens = [sequence.tokens for sequence in sequences]
        longest = max(len(ids) for ids in tokens)
        # Columns of padding on the left of each row, and the tokens that come next, [B, N].
        self._pads = [longest - len(ids) for ids in tokens]
        self._ids = torch.tensor(
            [[0] * pad + ids for pad, ids in zip(self._pads, tokens, strict=True)],
            device=loaded.device,
        )
        self._place()

    def _place(self) -> None:
        padded = any(self._pads)
        device = self._loaded.device
        self._padding = torch.tensor(self._pads, device=device)[:, None] if padded else None

    @property
    def outgrown(self) -> list[GeneratedSequence]:
        """The sequences that must begin anew, all of their keys are others now.

        With their new token they are longer than the limit from which longrope has other
        frequencies.
        """
        return [one for one in self.sequences if not one.finished and self._is_outgrown(one)]

    def _is_outgrown(self, sequence: GeneratedSequence) -> bool:
        limit = self._longrope_limit
        return limit is not None and not self.reads and sequence.length == limit + 1

    @property
    def unfinished(self) -> list[GeneratedSequence]:
        return [sequence for sequence in self.sequences if not sequence.finished]

    @property
    def next_tokens(self) -> int:
        """How many tokens, padding included, go through the model next."""
        return len(self.sequences) * self._columns()

    def advance(self) -> None:
        """Read the next tokens of the prompts, or generate one further token of each sequence."""
        past = self.cache.get_seq_length()
        columns = self._columns()
        ids, rest = self._ids[:, :columns], self._ids[:, columns:]
        self._note_rows(past, columns)
        with torch.no_grad(), self._edits.attached():
            logits = self._logits(ids, past)
            if rest.shape[1]:
                self._ids = rest
            else:
                self._append(logits)

    def _columns(self) -> int:
        """Return how many tokens of each row are next: few enough that others do not wait long."""
        limit, longest = self._longrope_limit, self._ids.shape[1]
        if limit is not None and longest > limit:
            # The frequencies of all tokens follow from the length, which the model must see.
            return longest
        return max(1, min(longest, PROMPT_TOKENS // len(self.sequences)))

    def _logits(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """Run the model over the tokens that come next; return the logits of the last, [B, V]."""
        model = self._loaded.model
        columns = torch.arange(past + ids.shape[1], device=ids.device)[None]
        mask, positions = None, columns[:, past:]
        if self._padding is not None:
            mask = columns >= self._padding
            positions = (positions - self._padding).clamp(min=0)
        output: Any = model(
            inputs_embeds=self._edits.edit_embeddings(model.get_input_embeddings()(ids)),
            attention_mask=mask,
            position_ids=positions.expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _append(self, logits: torch.Tensor) -> None:
        # A sequence that overflows must not end its neighbours: it goes on with any token, and
        # counts no more.
        broken = ~logits.isfinite().all(-1)
        logits = logits.masked_fill(broken[:, None], 0.0)
        tokens = sample(
            logits,
            [sequence.job.sampling for sequence in self.sequences],
            [sequence.random for sequence in self.sequences],
        )
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs = logprobs.masked_fill(broken, math.nan)
        # In one transfer: float64 holds both exactly.
        chosen = torch.stack((tokens.double(), logprobs.double())).tolist()
        for sequence, token, logprob in zip(self.sequences, *chosen, strict=True):
            sequence.append(int(token), logprob, self._end_tokens)
        self._ids = tokens[:, None]
        self.reads = False

    def _note_rows(self, past: int, columns: int) -> None:
        """Count the tokens of each sequence that come next, and let edits be made of them."""
        rows = []
        for row, (sequence, pad) in enumerate(zip(self.sequences, self._pads, strict=True)):
            # Without its padding.
            positions = range(max(0, past - pad), max(0, past + columns - pad))
            sequence.computed += len(positions)
            if sequence.job.edits:
                start = row * columns + columns - len(positions)
                rows.append(EditedRows(sequence.job.edits, start, positions))
        self._edits.move(rows)

    def regroup(self, others: Sequence[DecodeBatch] = ()) -> None:
        """Go on with the sequences of other batches too, and without those that leave.

        These are finished, or `outgrown`. The prompts of all batches have been read; the others
        are of no use after that.
        """
        kept = [(batch, rows) for batch in (self, *others) if (rows := batch._staying())]
        if kept == [(self, list(range(len(self.sequences))))]:
            return
        self.sequences = [batch.sequences[row] for batch, rows in kept for row in rows]
        if not kept:
            return
        self._ids = torch.cat([batch._ids[rows] for batch, rows in kept])
        # The last token of each has not been read.
        lengths = [sequence.length - 1 for sequence in self.sequences]
        longest = max(lengths)
        self._pads = [longest - length for length in lengths]
        self._place()
        self.cache.regroup([(batch.cache, rows) for batch, rows in kept], longest)

    def _staying(self) -> list[int]:
        return [
            row
            for row, sequence in enumerate(self.sequences)
            if not sequence.finished and not self._is_outgrown(sequence)
        ]


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text: those of the generation config, and the tokenizer's EOS.

    Both, as other servers have it: a chat template ends turns with the tokenizer's.
    """
    config = getattr(loaded.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ends = set(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset((ends | {loaded.tokenizer.eos_token_id}) - {None})
