"""Generates text for a batch of jobs, with a cache of keys and values, edits in place.

Sequences that do not fit into memory together, or fail, are generated in halves, one after the
other; each goes on behind the tokens that it has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from transformers import DynamicCache

from reltrace_worker.engine.edits import EditedRows, EditHooks
from reltrace_worker.engine.host_memory import is_out_of_memory, release
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.rope import longrope_limit
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import DeviceLostError, EngineError, PassFailedError
from reltrace_worker.types.jobs import GenerateJob, Sampling
from reltrace_worker.types.results import GeneratedText, JobResult, Outcome

log = structlog.get_logger()


@dataclass(slots=True)
class GeneratedSequence:
    """The tokens of one job so far."""

    job: GenerateJob
    random: torch.Generator = field(init=False)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    error: EngineError | None = None

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.job.sampling.seed)

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what is generated after it."""
        return [*self.job.token_ids, *self.ids]

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
        self._begin(sequences)

    def _begin(self, sequences: Sequence[GeneratedSequence]) -> None:
        self._sequences = list(sequences)
        tokens = [sequence.tokens for sequence in sequences]
        self._lengths = [len(ids) for ids in tokens]
        longest = max(self._lengths)
        pads = [longest - length for length in self._lengths]
        device = self._loaded.device
        self._mask = torch.tensor(
            [[0] * pad + [1] * (longest - pad) for pad in pads], device=device
        )
        self._ids = torch.tensor(
            [[0] * pad + ids for pad, ids in zip(pads, tokens, strict=True)], device=device
        )
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=self._loaded.model.config)
        self._edits = EditHooks(
            self._loaded,
            [
                EditedRows(sequence.job.edits, row * longest + pad, range(longest - pad))
                for row, (sequence, pad) in enumerate(zip(sequences, pads, strict=True))
            ],
        )

    def decode(self, steps: int, on_token: Callable[[], None] | None = None) -> None:
        """Generate at most so many tokens of each sequence; call `on_token` after each step."""
        for _ in range(steps):
            if all(sequence.finished for sequence in self._sequences):
                return
            self._drop_finished()
            if self._outgrows_longrope():
                self._begin([sequence for sequence in self._sequences if not sequence.finished])
            with torch.no_grad(), self._edits.attached():
                self._append(self._logits())
            if on_token is not None:
                on_token()

    def _outgrows_longrope(self) -> bool:
        """Whether a cache holds keys of a sequence that now has other rotary frequencies."""
        limit = self._longrope_limit
        return (
            limit is not None and limit + 1 in self._lengths and bool(self._cache.get_seq_length())
        )

    def _drop_finished(self) -> None:
        """Go on with the unfinished sequences alone, where they are half of the batch at most."""
        rows = [row for row, sequence in enumerate(self._sequences) if not sequence.finished]
        if 2 * len(rows) > len(self._sequences) or not self._cache.get_seq_length():
            return
        # On the CPU: a cache may be on several devices.
        kept = torch.tensor(rows)
        self._sequences = [self._sequences[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._ids, self._mask = self._ids[kept], self._mask[kept]
        self._positions = self._positions[kept]
        self._cache.batch_select_indices(kept)
        self._move_edits()

    def _logits(self) -> torch.Tensor:
        """Run the model over the tokens that come next; return the logits of the last, [B, V]."""
        model = self._loaded.model
        output: Any = model(
            inputs_embeds=self._edits.edit_embeddings(model.get_input_embeddings()(self._ids)),
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
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
            [sequence.job.sampling for sequence in self._sequences],
            [sequence.random for sequence in self._sequences],
        )
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs = logprobs.masked_fill(broken, math.nan)
        # In one transfer: float64 holds both exactly.
        chosen = torch.stack((tokens.double(), logprobs.double())).tolist()
        for sequence, token, logprob in zip(self._sequences, *chosen, strict=True):
            sequence.append(int(token), logprob, self._end_tokens)
        self._ids = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        self._lengths = [length + 1 for length in self._lengths]
        self._move_edits()

    def _move_edits(self) -> None:
        """Let edits be made of the one token of each sequence that comes next."""
        self._edits.move(
            [
                EditedRows(sequence.job.edits, row, range(length - 1, length))
                for row, (sequence, length) in enumerate(
                    zip(self._sequences, self._lengths, strict=True)
                )
            ]
        )


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text: those of the generation config, and the tokenizer's EOS.

    Both, as other servers have it: a chat template ends turns with the tokenizer's.
    """
    config = getattr(loaded.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ends = set(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset((ends | {loaded.tokenizer.eos_token_id}) - {None})


class Generation:
    """Text generation for some jobs, some tokens at a time; jobs are named by their index.

    `fault` tells why jobs do not fit into memory together; None: that may be tried.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        jobs: Sequence[GenerateJob],
        fault: Callable[[Sequence[GenerateJob]], EngineError | None],
    ) -> None:
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._fault = fault
        self._sequences = [GeneratedSequence(job) for job in jobs]
        self._open = set(range(len(jobs)))
        # Jobs that are decoded together: the first part is under way, the others wait.
        self._parts = deque([list(range(len(jobs)))])
        self._batch: DecodeBatch | None = None

    @property
    def finished(self) -> bool:
        """All jobs have ended, and their outcomes were taken."""
        return not self._open

    def cancel(self, job: int) -> None:
        """Generate no more for a job; it has no outcome."""
        self._open.discard(job)
        self._sequences[job].stopped = True

    def token_ids(self, job: int) -> list[int]:
        """Return what is generated of a job so far."""
        return list(self._sequences[job].ids)

    def take_outcomes(self) -> dict[int, Outcome]:
        """Return the outcomes of the jobs that have ended since the last call."""
        # Sorting copies the set at once: `cancel` is called on another thread.
        ended = [job for job in sorted(self._open) if self._sequences[job].finished]
        self._open.difference_update(ended)
        return {job: self._sequences[job].outcome(self._vocabulary) for job in ended}

    def decode(self, steps: int, on_token: Callable[[], None] | None = None) -> None:
        """Generate at most so many further tokens of each job; call `on_token` after each.

        Raises `torch.AcceleratorError`: the device does not work any more for this process.
        """
        while not (part := self._unfinished()) and self._parts:
            self._parts.popleft()
            self._batch = None
        failure = self._try_decode(part, steps, on_token) if part else None
        if failure is not None:
            self._batch = None
            # Out here the exception is gone, and with it the frames that held tensors.
            release(self._loaded.device)
            self._split(self._unfinished(), failure)

    def _unfinished(self) -> list[int]:
        """Return the jobs of the part that is under way which have not ended."""
        part = self._parts[0] if self._parts else []
        return [job for job in part if not self._sequences[job].finished]

    def _try_decode(
        self, part: Sequence[int], steps: int, on_token: Callable[[], None] | None
    ) -> EngineError | None:
        sequences = [self._sequences[job] for job in part]
        try:
            if self._batch is None:
                fault = self._fault([sequence.job for sequence in sequences])
                if fault is not None:
                    return fault
                self._batch = DecodeBatch(self._loaded, sequences)
            self._batch.decode(steps, on_token)
        except (torch.AcceleratorError, DeviceLostError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                return EngineError(
                    f"memory ran out while {len(sequences)} texts were generated: {error}"
                )
            log.warning("generation.failed", jobs=len(sequences), exc_info=error)
            return PassFailedError(f"generation failed: {type(error).__name__}: {error}")
        return None

    def _split(self, jobs: list[int], failure: EngineError) -> None:
        """Replace the first part by two halves of its jobs; a job alone has failed."""
        self._parts.popleft()
        if len(jobs) == 1:
            self._sequences[jobs[0]].error = failure
            return
        # Alike in length: less is padded.
        ordered = sorted(jobs, key=lambda job: len(self._sequences[job].tokens))
        half = len(ordered) // 2
        self._parts.extendleft([ordered[half:], ordered[:half]])
