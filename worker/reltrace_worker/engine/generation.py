"""Generates texts that join and leave while others are generated (continuous batching).

What joins is read by itself, some tokens of its prompt at a time, and its keys and values then
become rows of the running batch. Sequences that do not fit into memory together, or fail, are
generated in halves, one after the other; each goes on behind the tokens that it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import structlog
import torch

from reltrace_worker.engine.decoding import PROMPT_TOKENS, DecodeBatch, GeneratedSequence
from reltrace_worker.engine.host_memory import is_out_of_memory, release
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError, PassFailedError
from reltrace_worker.types.jobs import GenerateJob
from reltrace_worker.types.results import Outcome

log = structlog.get_logger()

DECODE_STEPS = 16
"""Tokens that a generation goes on by before another pass has its turn."""

MOST_TEXTS = {"cpu": 64, "cuda": 256}
"""Texts at a time: with more, a step takes longer for every text and generates hardly more tokens
in a second."""

_SHORT = 32
"""Tokens: prompts of up to so many are read together however unlike they are in length."""

Fault = Callable[[Sequence[GenerateJob], int], EngineError | None]
"""Tells why jobs do not fit into memory together, where so many bytes are allocated for some of
them already; None: that may be tried."""


class Generation:
    """Text generation for jobs, some tokens at a time; jobs are named by their numbers.

    The first have the numbers from 0 on. They are all taken in, and generated in parts where they
    do not fit together.
    """

    def __init__(self, loaded: LoadedModel, jobs: Sequence[GenerateJob], fault: Fault) -> None:
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._fault = fault
        # Those that have joined since the last step.
        self._new = [GeneratedSequence(job) for job in jobs]
        # Those whose outcomes were not taken.
        self._open = dict(enumerate(self._new))
        self._joined = len(jobs)
        # Sequences to be generated apart from all others: each part when the one before has ended.
        self._parts: deque[list[GeneratedSequence]] = deque()
        # Batches that read their prompts, and the one that generates.
        self._reading: deque[DecodeBatch] = deque()
        self._running: DecodeBatch | None = None

    @property
    def finished(self) -> bool:
        """All jobs have ended, and their outcomes were taken."""
        return not self._open

    def join(self, job: GenerateJob) -> int | None:
        """Take in a further job; return its number, or None: there is no room for it now."""
        batches = self._batches
        present = [*self._new, *(one for batch in batches for one in batch.sequences)]
        if self._parts or len(present) >= MOST_TEXTS[self._loaded.device.type]:
            return None
        jobs, held = [*(one.job for one in present), job], sum(one.cache.nbytes for one in batches)
        if present and self._fault(jobs, held) is not None:
            return None
        sequence, number = GeneratedSequence(job), self._joined
        self._joined += 1
        self._new.append(sequence)
        self._open[number] = sequence
        return number

    def cancel(self, job: int) -> None:
        """Generate no more for a job; it has no outcome."""
        if (sequence := self._open.pop(job, None)) is not None:
            sequence.stopped = True

    def token_ids(self, job: int) -> list[int]:
        """Return what is generated of an open job so far."""
        return list(self._open[job].ids)

    def take_work(self) -> dict[int, int]:
        """Return how many tokens of each job went through the model since the last call.

        Jobs that were cancelled, or whose outcome was taken, are left out.
        """
        work = {}
        for job, sequence in list(self._open.items()):
            work[job], sequence.counted = sequence.computed - sequence.counted, sequence.computed
        return work

    def take_outcomes(self) -> dict[int, Outcome]:
        """Return the outcomes of the jobs that have ended since the last call."""
        # Listed at once: `cancel` is called on another thread.
        ended = {job: one for job, one in list(self._open.items()) if one.finished}
        return {
            job: one.outcome(self._vocabulary)
            for job, one in ended.items()
            if self._open.pop(job, None) is not None
        }

    def decode(self, steps: int, on_token: Callable[[], None] | None = None) -> int:
        """Generate at most so many further tokens of each job; return how many steps it took.

        Ends as soon as a job has ended, so that its outcome can be taken. `on_token` is called
        after each step; jobs may join then.

        Raises `torch.AcceleratorError`: the device does not work any more for this process.
        """
        for step in range(steps):
            present = list(self._open.values())
            if not present or any(sequence.finished for sequence in present):
                return step
            self._step()
            if on_token is not None:
                on_token()
        return steps

    @property
    def _batches(self) -> list[DecodeBatch]:
        return [*self._reading, *([self._running] if self._running else [])]

    def _step(self) -> None:
        """Read some tokens of prompts, and generate a token of each sequence that runs."""
        running = self._running
        self._begin()
        left = PROMPT_TOKENS
        for _ in range(len(self._reading)):
            if left <= 0:
                break
            batch = self._reading[0]
            # Long prompts take turns with others.
            self._reading.rotate(-1)
            left -= batch.next_tokens
            self._try(batch.advance, [batch])
        if running is not None:
            self._try(running.advance, [running])
        self._regroup()

    def _begin(self) -> None:
        """Begin to read what is new, or the next part if nothing else is left."""
        if self._batches:
            self._read(self._new)
        else:
            if self._new:
                self._parts.append(self._new)
            while self._parts and not self._reading:
                part = [one for one in self._parts.popleft() if not one.finished]
                if not part:
                    continue
                failure = self._fault([sequence.job for sequence in part], 0)
                if failure is None:
                    self._read(part)
                else:
                    self._separate(part, failure)
        self._new = []

    def _read(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Let sequences read their prompts, those of like lengths together: less is padded."""
        group: list[GeneratedSequence] = []
        for sequence in sorted(sequences, key=lambda one: one.length):
            if group and sequence.length > max(_SHORT, 2 * group[0].length):
                self._reading.append(DecodeBatch(self._loaded, group))
                group = []
            group.append(sequence)
        if group:
            self._reading.append(DecodeBatch(self._loaded, group))

    def _regroup(self) -> None:
        """Let those run that have read their prompts, and take out those that have ended."""
        batches = [one for one in self._batches if not one.reads]
        self._reading = deque(one for one in self._reading if one.reads and one.unfinished)
        if not batches:
            return
        # The one that runs is the last: fewest rows change their batch.
        self._running = running = batches.pop()
        outgrown = [one for batch in (running, *batches) for one in batch.outgrown]
        if self._try(lambda: running.regroup(batches), [running, *batches]):
            self._running = running if running.sequences else None
            self._read(outgrown)

    def _try(self, work: Callable[[], None], batches: Sequence[DecodeBatch]) -> bool:
        """Do something with batches; where it fails, their sequences are generated apart."""
        sequences = [one for batch in batches for one in batch.sequences]
        failure = self._failure(work, len(sequences))
        if failure is None:
            return True
        self._reading = deque(one for one in self._reading if one not in batches)
        if self._running in batches:
            self._running = None
        # Out here the exception is gone, and with it the frames that held tensors.
        release(self._loaded.device)
        self._separate([one for one in sequences if not one.finished], failure)
        return False

    def _failure(self, work: Callable[[], None], texts: int) -> EngineError | None:
        try:
            work()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                return EngineError(f"memory ran out while {texts} texts were generated: {error}")
            log.warning("generation.failed", jobs=texts, exc_info=error)
            return PassFailedError(f"generation failed: {type(error).__name__}: {error}")
        return None

    def _separate(self, sequences: list[GeneratedSequence], failure: EngineError) -> None:
        """Generate sequences in halves, apart from all others; one that was alone has failed."""
        if len(sequences) == 1 and not self._batches:
            sequences[0].error = failure
            return
        # Alike in length: less is padded.
        ordered = sorted(sequences, key=lambda one: one.length)
        half = len(ordered) // 2
        self._parts.extendleft(part for part in (ordered[half:], ordered[:half]) if part)
