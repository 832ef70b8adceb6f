"""During a pass nothing waits for the device, and its operations do not grow with its jobs.

Shown without a GPU on the device "meta", whose tensors have shapes and no values: there every
operation that needs a value on the host fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench.models import SHAPES, build, job
from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.passes import PassTimer, Trace, trace_checkpointed, trace_keeping
from reltrace_worker.engine.recorder import RelevanceRecorder
from reltrace_worker.engine.targets import Readout, Scalar
from reltrace_worker.lrp import RULES, apply_rule
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.jobs import Edit, Target, Term, TraceJob
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
TRACES = [trace_keeping, trace_checkpointed]
REDUCED = {"token": 0, "feature": 0, "topk": 5, "full": 0}


class WithoutWaiting(TorchDispatchMode):
    """Fails on what would wait for a GPU; counts operations, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations[str(func)] += 1
        tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        here = [t.device.type != "meta" for t in tensors if t.dim()]
        if func is aten.copy_.default and args[0].device != args[1].device:
            # There is nothing to copy: as if it had been done.
            assert args[2] if len(args) > 2 else kwargs.get("non_blocking"), "a copy that waits"
            self.copies += 1
            return args[0]
        if func is aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            assert kwargs.get("non_blocking"), "a copy that waits"
        elif any(here):
            assert all(here), f"{func} copies its operands from the host to the device"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def shapes_only() -> LoadedModel:
    return build(SHAPES["tiny"], torch.float32, "meta")


@pytest.fixture
def scalars_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Readout]]:
    """Replace the one transfer at the end of a pass."""
    read: list[Readout] = []

    def note(readout: Readout) -> list[Scalar]:
        read.append(readout)
        return []

    monkeypatch.setattr(Readout, "scalars", note)
    return read


def run(loaded: LoadedModel, jobs: list[TraceJob], trace: Trace) -> WithoutWaiting:
    batch = PackedBatch.of([copy for each in jobs for copy in each.copies])
    recorder = RelevanceRecorder(loaded, batch)
    # The rotary factors and other buffers are read, too: all of the model is on the device.
    with WithoutWaiting() as mode, apply_rule(loaded.model, RULES[jobs[0].rule]):
        trace(loaded, batch, recorder, PassTimer(torch.device("cpu")))
    return mode


def mixed(reduction: str) -> list[TraceJob]:
    """Jobs of every kind of target, some with edits, some with two targets."""
    largest, named = Target((Term(6, None),)), Target((Term(3, 17),))
    contrast = Target((Term(6, None), Term(6, 5, -1.0)), contrast_id=5)
    answer = Target((Term(2, 4), Term(3, 5), Term(4, 6)), logprob=True, continuation_ids=(4, 5, 6))
    targets = [(largest,), (named, largest), (contrast,), (answer,)]
    made = (Edit("neuron", 1, (3,), (2,), scale=0.0), Edit("embed", direction=(0.1,) * 48))
    edits = [(), (), made]
    jobs = []
    for i in range(12):
        plain = job(list(range(7 + i // 2)), sites=("embed", "resid", "head", "neuron"))
        jobs.append(
            replace(
                plain,
                reduction=reduction,
                k=REDUCED[reduction],
                targets=targets[i % len(targets)],
                edits=edits[i % len(edits)],
            )
        )
    return jobs


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("reduction", REDUCED)
def test_nothing_waits_for_the_device(
    shapes_only: LoadedModel, scalars_read: list[Readout], trace: Trace, reduction: str
) -> None:
    """
    Given jobs of every kind of target and site, some of them with edits
    If their pass runs where tensors have no values
    I expect it to get to its end, and what targets found to be read once.
    """
    mode = run(shapes_only, mixed(reduction), trace)
    assert mode.copies > 0
    assert len(scalars_read) == 1


@pytest.mark.parametrize("trace", TRACES)
def test_nothing_waits_for_single_logits(
    shapes_only: LoadedModel, scalars_read: list[Readout], trace: Trace
) -> None:
    jobs = [
        replace(plain, targets=(Target((Term(2, 9), Term(3, 7))),), only_terms=True)
        for plain in (job(list(range(5))), job(list(range(8))))
    ]
    run(shapes_only, jobs, trace)
    assert len(scalars_read) == 1


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("reduction", REDUCED)
def test_the_operations_of_a_pass_do_not_grow_with_its_jobs(
    shapes_only: LoadedModel, scalars_read: list[Readout], trace: Trace, reduction: str
) -> None:
    """
    Given prompts of as many lengths, so that attention takes as many calls
    If four times as many share the pass
    I expect the same operations, one for one, and as many copies to the host.
    """

    def jobs(each: int) -> list[TraceJob]:
        plain = [job(list(range(n))) for n in (5, 9, 14, 30, 70) for _ in range(each)]
        targets = [(Target((Term(4, None),)),), (Target((Term(3, 17), Term(3, 5, -1.0))),)]
        return [
            replace(j, reduction=reduction, k=REDUCED[reduction], targets=targets[i % 2])
            for i, j in enumerate(plain)
        ]

    few, many = (run(shapes_only, jobs(each), trace) for each in (3, 12))
    assert few.operations == many.operations
    assert few.copies == many.copies
