"""The size of a result is known before its pass, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import REDUCTIONS, SITES, Engine, result_bytes
from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.session.tensors import cast
from reltrace_worker.types.jobs import (
    AtlasJob,
    GenerateJob,
    Sampling,
    TargetRequest,
    TraceJob,
    TraceRequest,
)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layers", [(), (2, 0)])
def test_the_size_of_a_trace_is_that_of_its_tensors(
    checkpoints: Checkpoints, reduction: str, layers: tuple[int, ...]
) -> None:
    loaded = checkpoints.loaded("grouped")
    k = 3 if reduction == "topk" else 0
    targets = (TargetRequest(), TargetRequest(continuation=" dogs and cats", each=True))
    requests = [
        TraceRequest(PROMPTS[0], tuple(SITES), reduction, targets, layers=layers, k=k),
        TraceRequest(PROMPTS[1], ("head",), reduction, layers=layers, k=1000 * k),
        TraceRequest(PROMPTS[1], (), reduction),
    ]
    jobs = prepare(loaded, *(requests if reduction != "topk" else requests[:2]))
    for job in jobs:
        assert isinstance(job, TraceJob)
        (result,) = run(Engine(loaded), [job])
        for dtype in (torch.float32, torch.bfloat16):
            size = sum(cast(tensor, dtype).nbytes for tensor in result.tensors)
            assert result_bytes(job, loaded.shape, dtype) == size


@pytest.mark.parametrize("next_tokens", [False, True])
def test_the_size_of_an_atlas_is_that_of_its_tensors(
    checkpoints: Checkpoints, next_tokens: bool
) -> None:
    loaded = checkpoints.loaded("grouped")
    prompts = tuple(prepare(loaded, *(TraceRequest(prompt) for prompt in PROMPTS)))
    numbers = tuple(range(1, len(prompts) + 1))
    job = AtlasJob(prompts, numbers, ((0, "is empty"),), k=5, next_tokens=next_tokens)
    engine = Engine(loaded)
    task = engine.begin([job])
    assert isinstance(task, Atlas)
    while not task.finished:
        engine.advance(task)
    size = sum(tensor.values.nbytes for tensor in task.tensors())
    assert result_bytes(job, loaded.shape) == size


def test_a_text_has_no_tensors(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    (trace,) = prepare(loaded, TraceRequest("a"))
    job = GenerateJob(trace.prompt, Sampling(4))
    assert result_bytes(job, loaded.shape) == 0
    assert result_bytes(replace(trace, sites=()), loaded.shape) == 0
