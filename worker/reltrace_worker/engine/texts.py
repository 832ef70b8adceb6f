"""Texts of several jobs: together as long as memory allows it and nothing fails, else in parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import structlog
import torch

from reltrace_worker.engine.budget import is_out_of_memory, release
from reltrace_worker.engine.generate import Text, Writing
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError, PassFailedError
from reltrace_worker.types.jobs import GenerateJob
from reltrace_worker.types.results import JobResult

log = structlog.get_logger()

Plan = Callable[[Sequence[GenerateJob]], EngineError | None]
"""Why jobs can not be written together; None: they can."""


class Texts:
    """The texts of some jobs, some tokens at a time.

    What does not fit into memory together, or fails, is written in halves, one after the other; a
    text that had begun goes on where it was. At last it is one job that does not fit or that fails.

    Parameters
    ----------
    loaded
        The model.
    jobs
        All with a `generation`.
    plan
        Tells whether they fit.
    """

    def __init__(self, loaded: LoadedModel, jobs: Sequence[GenerateJob], plan: Plan) -> None:
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._plan = plan
        self._texts = [Text(job) for job in jobs]
        self._left = set(range(len(jobs)))
        self._parts = deque([list(range(len(jobs)))])
        self._writing: Writing | None = None
        self._outcomes: dict[int, JobResult | EngineError] = {}

    @property
    def over(self) -> bool:
        """All of them have ended, and were handed out."""
        return not self._left and not self._outcomes

    def drop(self, job: int) -> None:
        """Write no more of a job that nobody waits for; it has no outcome."""
        self._left.discard(job)
        self._texts[job].stopped = True

    def token_ids(self, job: int) -> list[int]:
        """Return what is written of a job."""
        return list(self._texts[job].ids)

    def ended(self) -> dict[int, JobResult | EngineError]:
        """Hand out what came of the jobs that have ended since, by their number."""
        ended, self._outcomes = self._outcomes, {}
        return ended

    def go_on(self, tokens: int, wrote: Callable[[], None] | None = None) -> None:
        """Write at most so many further tokens of each text; call `wrote` after each.

        Raises
        ------
        torch.AcceleratorError
            The device does not work any more for this process.
        """
        failure: EngineError | None = None
        part = [job for job in self._parts[0] if job in self._left] if self._parts else []
        if part:
            failure = self._written(part, tokens, wrote)
        if failure is not None:
            self._writing = None
            # Out here the exception is gone, and with it the frames that held tensors.
            release(self._loaded.device)
            self._parts.popleft()
            self._divide([job for job in part if not self._texts[job].over], failure)
        self._take_out(part)

    def _written(
        self, part: Sequence[int], tokens: int, wrote: Callable[[], None] | None
    ) -> EngineError | None:
        """Write; return why it was not possible."""
        texts = [self._texts[job] for job in part]
        try:
            if self._writing is None:
                fault = self._plan([text.job for text in texts])
                if fault is not None:
                    return fault
                self._writing = Writing(self._loaded, texts)
            self._writing.go_on(tokens, wrote)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                return EngineError(f"memory ran out while {len(texts)} texts were written: {error}")
            log.warning("texts.failed", jobs=len(texts), error=str(error))
            return PassFailedError(f"writing failed: {type(error).__name__}: {error}")
        return None

    def _divide(self, part: list[int], failure: EngineError) -> None:
        if len(part) == 1:
            self._outcomes[part[0]] = failure
            self._left.discard(part[0])
            return
        # Alike in length: less is padded.
        ordered = sorted(part, key=lambda job: len(self._texts[job].tokens))
        half = len(ordered) // 2
        self._parts.extendleft([ordered[half:], ordered[:half]])

    def _take_out(self, part: Sequence[int]) -> None:
        """Note the outcomes of the texts that are over, and go to the next part after the last."""
        for job in part:
            text = self._texts[job]
            if job in self._left and text.over:
                self._left.discard(job)
                self._outcomes[job] = text.fault or JobResult(
                    generated=text.written(self._vocabulary)
                )
        while self._parts and not self._left.intersection(self._parts[0]):
            self._parts.popleft()
            self._writing = None
