"""Memory: what a pass needs is known before, what is missing does not take the worker down."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference.checkpoints import FAMILY_RECIPES, RECIPES, save_checkpoint
from reference.loaded import DEVICE, PROMPTS, Checkpoints, prepare, run
from reference.peak import peak_bytes
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.engine import engine as engine_module
from reltrace_worker.engine.host_memory import is_out_of_memory
from reltrace_worker.engine.memory import MemoryPlan
from reltrace_worker.engine.passes import segment_length, trace_checkpointed, trace_keeping
from reltrace_worker.lrp import RULES
from reltrace_worker.lrp.lxt_rules import lxt_rules
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.types.errors import EngineError, NotFiniteError
from reltrace_worker.types.jobs import Edit, TargetRequest, TraceJob, TraceRequest
from reltrace_worker.types.results import JobResult

GIB = 1 << 30


FULL: dict[str, Any] = {"sites": ("neuron",), "reduction": "full"}


def some(checkpoints: Checkpoints, count: int = 4, **fields: Any) -> list[TraceJob]:
    loaded = checkpoints.loaded("grouped")
    return prepare(loaded, *(TraceRequest(PROMPTS[i], **fields) for i in range(count)))


def need(loaded: LoadedModel, jobs: list[TraceJob], checkpointing: bool) -> int:
    """Return the bytes that are planned for a pass over the targets of jobs that are packed."""
    assert not any(job.alone for job in jobs)
    copies = [copy for job in jobs for copy in job.copies]
    return MemoryPlan(loaded).trace_bytes(copies, checkpointing)


def peak(loaded: LoadedModel, jobs: list[TraceJob], checkpointing: bool) -> int:
    """Return the bytes that a pass allocates."""
    engine = Engine(loaded, "on" if checkpointing else "off")
    return peak_bytes(loaded, lambda: run(engine, jobs))


class Limited:
    """Lets passes fail whose jobs have too many tokens, as an allocator would."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.keeping = self.checkpointed = 10**9
        self.passes: list[tuple[int, bool]] = []
        for name, trace in (
            ("trace_keeping", trace_keeping),
            ("trace_checkpointed", trace_checkpointed),
        ):
            patch.setattr(engine_module, name, self._limited(trace, error))

    def _limited(self, trace: Any, error: BaseException) -> Any:
        checkpointing = trace is trace_checkpointed

        def limited(loaded: Any, batch: Any, *others: Any, **named: Any) -> Any:
            self.passes.append((len(batch.jobs), checkpointing))
            if batch.packing.tokens > (self.checkpointed if checkpointing else self.keeping):
                raise error
            return trace(loaded, batch, *others, **named)

        return limited


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """
    Given a pass over four jobs for which memory is missing, and enough for each alone
    If they are traced together
    I expect every job's own numbers, from packs half as large.
    """
    loaded, jobs = checkpoints.loaded("grouped"), some(checkpoints)
    wanted = run(Engine(loaded, "off"), jobs)
    limited = Limited(monkeypatch, error)
    lengths = sorted(len(job.token_ids) for job in jobs)
    limited.keeping = lengths[-1] + lengths[-2]
    results = run(Engine(loaded, "off"), jobs)
    assert limited.passes == [(4, False), (2, False), (2, False)]
    for ours, theirs in zip(results, wanted, strict=True):
        assert ours.checkpointing is False
        size = float(theirs.tensors[0].values.abs().max())
        assert float((ours.tensors[0].values - theirs.tensors[0].values).abs().max()) < 1e-5 * size


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_one_job_that_does_not_fit_is_checkpointed(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, setting: Any
) -> None:
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest(PROMPTS[5]), TraceRequest(PROMPTS[1]))
    engine = Engine(loaded, setting)
    limited = Limited(monkeypatch, ERRORS[0])
    limited.keeping = len(jobs[1].token_ids)
    long, short = run(engine, jobs)
    assert (long.checkpointing, short.checkpointing) == (True, False)
    assert limited.passes == [(2, False), (1, False), (1, False), (1, True)]


def test_only_a_job_that_can_not_fit_fails_and_says_by_how_much(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(
        loaded, TraceRequest(PROMPTS[1]), TraceRequest(PROMPTS[5]), TraceRequest(PROMPTS[3])
    )
    limited = Limited(monkeypatch, ERRORS[1])
    limited.keeping = limited.checkpointed = 63
    engine = Engine(loaded)
    first, failed, last = engine.run(jobs)
    assert isinstance(failed, EngineError)
    match = re.search(
        r"one prompt of 64 tokens .* needs (\d+) bytes .* (\d+) \(.* avail", str(failed)
    )
    assert match is not None
    assert int(match.group(1)) == need(loaded, [jobs[1]], checkpointing=True)
    assert isinstance(first, JobResult)
    assert isinstance(last, JobResult)
    # And the engine works on.
    limited.keeping = 10**9
    assert all(isinstance(result, JobResult) for result in engine.run(jobs))


def test_auto_decides_by_the_budget(checkpoints: Checkpoints) -> None:
    """
    Given budgets just above and below what a pack needs without and with checkpointing
    If it is traced with checkpointing "auto"
    I expect it off where that fits, else on, else smaller packs, else an error.
    """
    loaded, jobs = checkpoints.loaded("grouped"), some(checkpoints)
    keeping, checkpointed = (need(loaded, jobs, on) for on in (False, True))
    assert checkpointed < keeping

    def modes(limit: int) -> set[bool | None]:
        results = Engine(loaded, memory_bytes=limit).run(jobs)
        return {r.checkpointing if isinstance(r, JobResult) else None for r in results}

    assert modes(keeping) == {False}
    assert modes(keeping - 1) == {True}
    assert modes(checkpointed) == {True}
    single = max(need(loaded, [job], True) for job in jobs)
    assert None not in modes(single)
    if DEVICE == "cpu":
        # A GPU is tried all the same: running out of its memory is harmless.
        assert None in modes(single - 1)
        assert modes(1) == {None}


def test_an_explicit_setting_keeps_its_limit(checkpoints: Checkpoints) -> None:
    loaded, jobs = checkpoints.loaded("grouped"), some(checkpoints)
    for setting, checkpointing in (("on", True), ("off", False)):
        limit = need(loaded, jobs, checkpointing) - 1
        engine = Engine(loaded, setting, limit)  # type: ignore[arg-type]
        results = run(engine, jobs)
        # Smaller packs, but the mode that was asked for.
        assert {result.checkpointing for result in results} == {checkpointing}


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.integers(4, 60), min_size=1, max_size=3),
    sites=st.lists(st.sampled_from(sorted(SITES)), min_size=1, max_size=3, unique=True),
    reduction=st.sampled_from(["token", "feature", "topk", "full"]),
    targets=st.integers(1, 3),
    checkpointing=st.booleans(),
)
def test_the_need_is_not_below_what_a_pass_allocates(
    checkpoints: Checkpoints,
    lengths: list[int],
    sites: list[str],
    reduction: str,
    targets: int,
    checkpointing: bool,
) -> None:
    loaded = checkpoints.loaded("deep")
    k = 7 if reduction == "topk" else 0
    shared = (tuple(sites), reduction, (TargetRequest(),) * targets)
    jobs = prepare(loaded, *(TraceRequest(tuple(range(5, 5 + n)), *shared, k=k) for n in lengths))
    planned, allocated = need(loaded, jobs, checkpointing), peak(loaded, jobs, checkpointing)
    # Small tensors aside, that take more than their bytes.
    assert allocated <= 1.05 * planned + 100_000
    assert planned < 4 * allocated


LONG = tuple(range(10, 130))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("recipe", "specs"),
    [
        # Many targets of one job beside much of another's.
        (
            "plain",
            [
                TraceRequest(
                    (5, 6), targets=tuple(TargetRequest(token=n) for n in range(64)), **FULL
                ),
                TraceRequest(LONG, **FULL),
            ],
        ),
        # Many targets at one position, each with the logarithm of its probability.
        (
            "plain",
            [
                TraceRequest(
                    (5, 6), targets=tuple(TargetRequest(n, logprob=True) for n in range(256))
                )
            ],
        ),
        # Many edits of many features.
        (
            "plain",
            [TraceRequest(LONG, edits=(Edit("neuron", 1, tuple(range(70)), scale=0.999),) * 64)],
        ),
        *(("plain", [TraceRequest(LONG, rule=rule)]) for rule in RULES),
    ],
)
def test_what_one_job_asks_for_is_in_the_plan(
    checkpoints: Checkpoints, recipe: str, specs: list[TraceRequest], checkpointing: bool
) -> None:
    loaded = checkpoints.loaded(recipe)
    jobs = prepare(loaded, *specs)
    assert peak(loaded, jobs, checkpointing) <= 1.1 * need(loaded, jobs, checkpointing) + 100_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["grouped", *FAMILY_RECIPES])
def test_no_rule_of_no_family_needs_more_than_planned(
    checkpoints: Checkpoints, recipe: str, dtype: str
) -> None:
    """The plan knows shapes alone: what the functions of each rule keep is held against it."""
    loaded = checkpoints.loaded(recipe, dtype)
    logprob = (TargetRequest(logprob=True),)
    for rule in RULES:
        jobs = prepare(loaded, *[TraceRequest(LONG, rule=rule, targets=logprob)] * 3)
        for checkpointing in (False, True):
            planned = need(loaded, jobs, checkpointing)
            assert peak(loaded, jobs, checkpointing) <= 1.02 * planned, (rule, checkpointing)


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
def test_what_lxts_functions_keep_is_in_the_plan(checkpoints: Checkpoints, rule: str) -> None:
    loaded = checkpoints.loaded("grouped")
    rules = lxt_rules(loaded.family)
    jobs = prepare(loaded, *[TraceRequest(LONG, rule=rule)] * 3)
    for checkpointing in (False, True):
        planned = MemoryPlan(loaded, rules=rules).trace_bytes(jobs, checkpointing)
        engine = Engine(loaded, "on" if checkpointing else "off", rules=rules)
        allocated = peak_bytes(loaded, lambda engine=engine: run(engine, jobs))
        assert allocated <= 1.02 * planned, checkpointing


@pytest.mark.parametrize("activation", ["gelu_new", "laplace", "relu"])
def test_an_activation_that_is_not_known_is_in_the_plan(tmp_path: Path, activation: str) -> None:
    """One that is made of plain operations keeps more than one that is a function of torch."""
    folder = save_checkpoint(tmp_path, replace(RECIPES["deep"], intermediate_size=400))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": activation}))
    loaded = load_model(str(folder), device=DEVICE)
    for rule in RULES:
        jobs = prepare(loaded, *[TraceRequest(LONG, rule=rule)] * 3)
        for checkpointing in (False, True):
            planned = need(loaded, jobs, checkpointing)
            assert peak(loaded, jobs, checkpointing) <= 1.02 * planned, (rule, checkpointing)
            assert planned < 4 * peak(loaded, jobs, checkpointing)


@pytest.mark.skipif(DEVICE != "cpu", reason="windows are cut into blocks on a CPU")
@pytest.mark.parametrize("key_value_heads", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompts_past_a_long_window_are_in_the_plan(
    tmp_path: Path, key_value_heads: int, checkpointing: bool
) -> None:
    """The window is longer than what is measured, so that no measurement reaches past it."""
    recipe = replace(
        RECIPES["mistral"],
        sliding_window=256,
        context_length=1024,
        key_value_heads=key_value_heads,
    )
    loaded = load_model(str(save_checkpoint(tmp_path, recipe)), device=DEVICE)
    for length in (250, 257, 700):
        jobs = prepare(loaded, TraceRequest(tuple(10 + n % 300 for n in range(length))))
        planned, allocated = need(loaded, jobs, checkpointing), peak(loaded, jobs, checkpointing)
        assert allocated <= 1.05 * planned
        assert planned < 2 * allocated


def test_a_job_that_is_not_finite_in_a_pack_is_run_alone(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a kernel that lets what is not finite reach a neighbour
    I expect the neighbour's own result, and the error of the one at fault.
    """
    loaded, jobs = checkpoints.loaded("grouped"), some(checkpoints)
    engine = Engine(loaded, "off")
    wanted = run(engine, jobs)
    error = NotFiniteError("the scalar of targets[0] is nan")
    packs: list[int] = []
    try_batch = engine._try_batch

    def leaking(batch: list[TraceJob], *mode: Any) -> Any:
        packs.append(len(batch))
        found = try_batch(batch, *mode)
        assert found is not None
        bad = [jobs[1]] if len(batch) == 1 else jobs[1:3]
        return [error if job in bad else one for job, one in zip(batch, found, strict=True)]

    monkeypatch.setattr(engine, "_try_batch", leaking)
    found = engine.run(jobs)
    assert packs == [4, 1, 1]
    assert found[1] is error
    for number in (0, 2, 3):
        ours = found[number]
        assert isinstance(ours, JobResult)
        size = float(wanted[number].tensors[0].values.abs().max())
        difference = ours.tensors[0].values - wanted[number].tensors[0].values
        assert float(difference.abs().max()) < 1e-5 * size


def test_the_token_budget(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("deep")
    roomy, tight = (
        n * MemoryPlan(loaded).bytes_per_token("attnlrp", checkpointing=False) for n in (2000, 500)
    )

    def budget(setting: Any, limit: int) -> int:
        return Engine(loaded, setting, limit).token_budget()

    assert budget("auto", 100 * GIB) == engine_module.MOST_TOKENS[loaded.device.type]
    assert budget("auto", roomy) == pytest.approx(2000, abs=1)
    assert budget("off", tight) == pytest.approx(500, abs=1)
    # With little room, more tokens with checkpointing beat few without.
    assert budget("auto", tight) == budget("on", tight) > 1000
    assert budget("on", 1) == 1


def test_checkpointing_grows_with_the_root_of_the_depth_or_better() -> None:
    """
    Given one shape at growing depth
    If the peak of a pass is measured with checkpointing and without
    I expect the share of the first in the second to fall at least as fast as one over the root.
    """
    from bench.engine import peaks
    from bench.models import SHAPES, build

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[int, list[int]] = {}
    for depth in (4, 16, 64):
        loaded = build(dataclasses.replace(SHAPES["tiny"], layers=depth), torch.float32)
        both = peaks(loaded, 100)
        found[depth] = [both["off"], both["on"]]
    torch.set_num_threads(threads)
    for shallow, deep in ((4, 16), (16, 64), (4, 64)):
        off, on = (found[deep][i] / found[shallow][i] for i in (0, 1))
        assert off > 0.8 * deep / shallow
        assert on <= 1.15 * (deep / shallow) ** 0.5, found


@pytest.mark.parametrize(("layers", "expected"), [(1, 1), (30, 2), (80, 3), (500, 7)])
def test_the_segment_length_is_the_smallest_sum(layers: int, expected: int) -> None:
    hidden, width = 576, 10 * 576
    sizes = {s: layers / s * hidden + s * width for s in range(1, 30)}
    assert segment_length(layers, hidden, width) == expected
    assert sizes[expected] <= 1.02 * min(sizes.values())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((error, True) for error in ERRORS),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_is_available_is_what_is_free_and_no_more_than_the_limit(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("plain")
    assert 0 < MemoryPlan(loaded).available < 1 << 50
    assert MemoryPlan(loaded, 1000).available == 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries trim differently")
def test_freed_memory_goes_back_to_the_system() -> None:
    """
    Given 400 MiB in blocks that glibc keeps when they are freed, because one in use stands above
    If memory is trimmed
    I expect the process to hold less than 100 MiB of it.
    """
    script = """
import torch
from reltrace_worker.engine.host_memory import Trimmer, _resident_bytes
trimmer = Trimmer()
trimmer.trim()
before = _resident_bytes()
blocks = [torch.ones(1 << 13) for _ in range(12800)]
top = torch.ones(1 << 13)
del blocks
kept = _resident_bytes() - before
trimmer.trim()
print(kept >> 20, (_resident_bytes() - before) >> 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 300
    assert left < 100
