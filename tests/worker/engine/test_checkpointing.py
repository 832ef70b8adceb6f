"""Checkpointing changes memory, not numbers."""

from __future__ import annotations

import pytest
import torch
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import REDUCTIONS, SITES, Engine, passes
from reltrace_worker.lrp import RULES
from reltrace_worker.types.jobs import TargetRequest, TraceRequest

TARGETS = (
    TargetRequest(),
    TargetRequest(token=5, contrast=9),
    TargetRequest(position=0, logprob=True),
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_equals_off_bit_for_bit_for_every_site(
    checkpoints: Checkpoints, rule: str, reduction: str
) -> None:
    """
    Given a pack whose jobs have different numbers of targets and different sites
    If it is traced with checkpointing and without
    I expect the same bits.
    """
    loaded = checkpoints.loaded("grouped")
    sites = tuple(SITES)
    k = 9 if reduction == "topk" else 0
    specs = [
        TraceRequest(PROMPTS[0], sites, reduction, TARGETS, rule, k=k),
        TraceRequest(PROMPTS[1], sites[2:4], reduction, TARGETS[:1], rule, k=k),
        TraceRequest(PROMPTS[2], sites[::-1], reduction, TARGETS[1:], rule, (3, 1), k),
        TraceRequest(PROMPTS[4], sites, "token", TARGETS, rule),
    ]
    jobs = prepare(loaded, *specs)
    kept = run(Engine(loaded, "off"), jobs)
    recomputed = run(Engine(loaded, "on"), jobs)
    for job, off, on in zip(jobs, kept, recomputed, strict=True):
        assert (off.checkpointing, on.checkpointing) == (False, True)
        assert off.targets == on.targets
        assert [(t.trace, t.site) for t in on.tensors] == [
            (trace, site)
            for trace in range(len(job.targets))
            for site in job.sites
            for _ in REDUCTIONS[job.reduction].parts
        ]
        for left, right in zip(off.tensors, on.tensors, strict=True):
            assert left.part == right.part
            assert torch.equal(left.values, right.values), left.site
            if left.values.is_floating_point():
                assert float(left.values.abs().max()) > 0.0


@pytest.mark.parametrize("length", [2, 3, 5, 12])
@pytest.mark.parametrize("layers", [(), (7, 3), (11,)])
def test_segments_of_any_length_give_the_same_bits(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, length: int, layers: tuple[int, ...]
) -> None:
    """
    Given checkpointing that recomputes several layers in one go, also where the count does not
    divide the depth, and a backward that stops above the first layer
    If jobs with several targets are traced
    I expect the bits of a pass without checkpointing.
    """
    loaded = checkpoints.loaded("deep")
    sites = tuple(SITES) if not layers else ("resid", "neuron", "resid_mid")
    jobs = prepare(
        loaded,
        TraceRequest(PROMPTS[0], sites, "token", TARGETS, layers=layers),
        TraceRequest(PROMPTS[1], ("resid",), "full", layers=layers[:1]),
    )
    kept = run(Engine(loaded, "off"), jobs)
    monkeypatch.setattr(passes, "segment_length", lambda *_: length)
    for off, on in zip(kept, run(Engine(loaded, "on"), jobs), strict=True):
        for left, right in zip(off.tensors, on.tensors, strict=True):
            assert torch.equal(left.values, right.values), left.site


def test_checkpointing_keeps_one_layers_graph_at_a_time(checkpoints: Checkpoints) -> None:
    """
    Given the bytes that autograd saves for the backward pass
    If the passes of one job are traced with and without checkpointing
    I expect the largest amount alive at a time to be at most that of a few layers' share.
    """
    loaded = checkpoints.loaded("deep")
    (job,) = prepare(loaded, TraceRequest(PROMPTS[5]))

    class Alive:
        now = 0
        most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            # Detached: held itself, an output that is saved would keep its own graph.
            self.tensor = tensor.detach()
            Alive.now += tensor.nbytes
            Alive.most = max(Alive.most, Alive.now)

        def __del__(self) -> None:
            Alive.now -= self.tensor.nbytes

    def most_alive(engine: Engine) -> int:
        Alive.now = Alive.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            run(engine, [job])
        return Alive.most

    off, on = most_alive(Engine(loaded, "off")), most_alive(Engine(loaded, "on"))
    assert on < 2 * off / loaded.shape.layers
