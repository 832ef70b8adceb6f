"""Several targets of one prompt: packed as copies of it, or one backward pass after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reference.real_models import RealModels
from reltrace_worker.engine import REDUCTIONS, SITES, Engine, preparing
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import Edit, TargetRequest, TraceJob, TraceRequest
from reltrace_worker.types.results import JobResult, Outcome

TARGETS = (
    TargetRequest(),
    TargetRequest(token=5, contrast=9),
    TargetRequest(position=0, logprob=True),
    TargetRequest(continuation=(8, 9, 10), each=True),
)
EDITS = (
    Edit("neuron", 1, (3, 8), scale=0.0),
    Edit("resid", 0, positions=(1,), direction=()),
    Edit("embed", 0, positions=(0,), scale=0.5),
)


def assert_close(ours: JobResult, wanted: JobResult, tolerance: float = 1e-5) -> None:
    """Compare within the tolerance times each tensor's largest |R|."""
    assert [target.token_id for target in ours.targets] == [t.token_id for t in wanted.targets]
    assert [target.target for target in ours.targets] == [t.target for t in wanted.targets]
    assert [(t.trace, t.site, t.part) for t in ours.tensors] == [
        (t.trace, t.site, t.part) for t in wanted.tensors
    ]
    for left, right in zip(ours.tensors, wanted.tensors, strict=True):
        assert left.values.shape == right.values.shape
        error = (left.values.double() - right.values.double()).abs().max()
        assert float(error) <= tolerance * float(right.values.double().abs().max()), left.site


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_copies_give_the_numbers_of_one_backward_pass_after_another(
    checkpoints: Checkpoints, reduction: str, checkpointing: str
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "on" if checkpointing == "on" else "off")
    k = 5 if reduction == "topk" else 0
    # Sums may cancel: they are compared where a site is whole, and alone.
    sites = tuple(SITES) if reduction == "full" else ("embed", "resid")
    specs = [
        TraceRequest(PROMPTS[0], sites, reduction, TARGETS, k=k, edits=EDITS),
        TraceRequest(PROMPTS[3], sites, reduction, TARGETS[:2], k=k, layers=(3, 1)),
    ]
    jobs = prepare(loaded, *specs)
    assert [len(job.targets) for job in jobs] == [6, 2]
    assert [job.alone for job in jobs] == [False, False]
    packed = run(engine, jobs)
    for job, ours in zip(jobs, packed, strict=True):
        job = replace(job, packs_targets=False)
        assert job.alone
        (wanted,) = run(engine, [job])
        assert_close(ours, wanted)
        assert ours.hints == wanted.hints


class Counted:
    """An engine whose batches are noted: rows, most targets of a job, and whether it recomputes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int, bool]] = []
        self._run = engine._run_batch
        monkeypatch.setattr(engine, "_run_batch", self.run)

    def run(self, jobs: list[TraceJob], checkpointing: bool) -> list[Outcome]:
        rows, most = sum(len(job.token_ids) for job in jobs), max(len(job.targets) for job in jobs)
        self.batches.append((rows, most, checkpointing))
        return self._run(jobs, checkpointing)


def test_many_targets_beside_others_cost_what_both_cost_apart(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given one job of 32 targets and 31 of one
    I expect together the rows of both apart, through one forward and one backward pass; and of a
    long prompt one forward pass, with backward passes over its own rows alone.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    many = tuple(TargetRequest(token=token) for token in range(32))
    ids = tuple(range(20, 40))
    singles = prepare(loaded, *(TraceRequest(ids[: 5 + n % 10]) for n in range(31)))
    short, long = prepare(
        loaded, TraceRequest(ids, targets=many), TraceRequest(ids * 6, targets=many)
    )
    assert (short.rows, short.passes, short.alone) == (640, 2, False)
    assert (long.rows, long.passes, long.alone) == (120, 33, True)
    counted = Counted(engine, monkeypatch)
    rows = sum(job.rows for job in singles)
    run(engine, [*singles, short, long])
    assert counted.batches == [(rows + 640, 1, False), (120, 32, False)]


def test_a_prompt_is_copied_where_that_takes_less_time(checkpoints: Checkpoints) -> None:
    """2 b N T against (1 + T) (a + b N), with a / b rows of the device."""
    loaded = checkpoints.loaded("grouped")
    balance = preparing.ROWS_PER_READING[loaded.device.type]
    for tokens in range(1, 128):
        for count in (1, 2, 3, 8, 32):
            spec = TraceRequest((7,) * tokens, targets=(TargetRequest(),) * count)
            (job,) = prepare(loaded, spec)
            copies, apart = 2 * tokens * count, (1 + count) * (balance + tokens)
            # A job of one target is the same either way.
            assert job.packs_targets == (count == 1 or copies <= apart), (tokens, count)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_job_that_is_to_stop_goes_on_with_the_same_bits(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    """
    Given a prompt of 20 targets that are traced one after another
    If others are to have their turn after some of them, and it goes on later
    I expect the bits of a job that was not interrupted.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "on" if checkpointing == "on" else "off")
    many = tuple(TargetRequest(token=token) for token in range(20))
    (job,) = prepare(loaded, TraceRequest(PROMPTS[0], tuple(SITES), "full", many))
    job = replace(job, packs_targets=False)
    (wanted,) = run(engine, [job])
    counted = Counted(engine, monkeypatch)
    asked = iter(range(1000))
    engine.should_stop = lambda: next(asked) % 3 in (1, 2)
    parts: list[JobResult] = []
    left = job.targets
    while left:
        (part,) = run(engine, [replace(job, targets=left)])
        parts.append(part)
        left = left[len(part.targets) :]
    assert len(parts) > 1
    assert len(counted.batches) >= len(parts)
    if checkpointing == "on":
        assert max(most for _, most, _ in counted.batches) == 8
    result = engine.join(parts)
    assert result.targets == wanted.targets
    assert result.hints == wanted.hints
    assert [(t.trace, t.site) for t in result.tensors] == [
        (t.trace, t.site) for t in wanted.tensors
    ]
    for left_tensor, right in zip(result.tensors, wanted.tensors, strict=True):
        assert torch.equal(left_tensor.values, right.values)


def test_a_forward_pass_alone_takes_its_rows_once(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded)
    counted = Counted(engine, monkeypatch)
    many = tuple(TargetRequest(token=token) for token in range(32))
    jobs = prepare(loaded, TraceRequest((5, 6, 7), (), targets=many), TraceRequest((8, 9), ()))
    assert (jobs[0].rows, jobs[0].passes) == (3, 1)
    results = run(engine, jobs)
    assert [len(result.targets) for result in results] == [32, 1]
    assert [rows for rows, _, _ in counted.batches] == [5]


def test_a_target_that_is_not_finite_fails_its_job_after_one_further_pass(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    many = tuple(TargetRequest(token=token) for token in range(4))
    jobs = prepare(
        loaded, TraceRequest((5, 200, 7), targets=many), TraceRequest((8, 9, 10), targets=many)
    )
    counted = Counted(engine, monkeypatch)
    table: torch.Tensor = loaded.model.get_input_embeddings().weight
    whole = table[200].clone()
    try:
        table[200, 3] = float("nan")
        broken, other = engine.run(jobs)
    finally:
        table[200] = whole
    assert isinstance(broken, EngineError)
    assert "targets[0]" in str(broken)
    assert isinstance(other, JobResult)
    assert [rows for rows, _, _ in counted.batches] == [24, 12]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["smollm2"])
def test_real_weights_give_the_same_numbers_either_way(name: str, real_models: RealModels) -> None:
    """SmolLM2: 8 targets of a short prompt beside another, and one pass after another."""
    loaded: LoadedModel = real_models.loaded(name)
    engine = Engine(loaded, "off")
    targets = tuple(TargetRequest(token=token) for token in (260, 284, 338, 506, 1343, 2000, 3, 4))
    jobs = prepare(
        loaded,
        TraceRequest("The capital of France is", ("embed", "resid", "neuron"), "full", targets),
        TraceRequest("Mary and John went to the store"),
    )
    packed = run(engine, jobs)[0]
    (wanted,) = run(engine, [replace(jobs[0], packs_targets=False)])
    assert_close(packed, wanted, 1e-4)
