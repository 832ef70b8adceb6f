"""Random checkpoints, written once per test session and loaded once per dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import pytest
import torch
from reference.checkpoints import RECIPES, save_checkpoint
from reltrace_worker.engine import Engine, JobPreparer
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.types.jobs import (
    GenerateJob,
    GenerateRequest,
    TraceJob,
    TraceRequest,
)
from reltrace_worker.types.results import JobResult, Outcome

DEVICE = os.environ.get("RELTRACE_TEST_DEVICE", "cpu")
"""Where the models of these tests are: `make gpu` sets it to cuda."""

PROMPTS: tuple[str | tuple[int, ...], ...] = (
    "I have 5 cats and 3 dogs. My cats love to play with my",
    "The quick brown fox",
    "Grüße aus Köln, 東京!",
    (7, 300, 12, 12, 45, 260, 99),
    (17,),
    # Longer than the 32 positions at which the llama3 recipe's rope scaling begins.
    tuple(range(10, 74)),
    "The quick brown cat",
)


class Checkpoints:
    """The recipes as folders, loaded models, and prepared jobs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = cache(self._folder)
        self.loaded = cache(self._loaded)

    def _folder(self, name: str) -> Path:
        return save_checkpoint(self._root / name, RECIPES[name])

    def _loaded(self, name: str, dtype: str = "float32") -> LoadedModel:
        return load_model(str(self.folder(name)), dtype=dtype, device=DEVICE)


def preparer(loaded: LoadedModel) -> JobPreparer:
    return JobPreparer(loaded)


@overload
def prepare(loaded: LoadedModel, *requests: TraceRequest) -> list[TraceJob]: ...
@overload
def prepare(loaded: LoadedModel, *requests: GenerateRequest) -> list[GenerateJob]: ...
def prepare(loaded: LoadedModel, *requests: Any) -> list[Any]:
    """Prepare jobs."""
    jobs = preparer(loaded)
    return [jobs.prepare(request) for request in requests]


def outcomes(engine: Engine, jobs: Sequence[TraceJob | GenerateJob]) -> list[Outcome]:
    """Run jobs, together those that may share a pass; return one outcome per job, in order."""
    found: dict[int, Outcome] = {}
    for key in {job.batch_key for job in jobs}:
        indices = [index for index, job in enumerate(jobs) if job.batch_key == key]
        traces = [job for index in indices if isinstance(job := jobs[index], TraceJob)]
        if traces:
            found |= zip(indices, engine.run(traces), strict=True)
            continue
        task = engine.begin([jobs[index] for index in indices])
        while not task.finished:
            engine.advance(task)
            found |= {indices[n]: outcome for n, outcome in task.take_outcomes().items()}
    return [found[index] for index in range(len(jobs))]


def run(engine: Engine, jobs: Sequence[TraceJob | GenerateJob]) -> list[JobResult]:
    """Run jobs that must all succeed."""
    results = []
    for result in outcomes(engine, jobs):
        assert isinstance(result, JobResult), result
        results.append(result)
    return results


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    # The models are far too small for a second thread to pay.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    torch.set_num_threads(threads)
