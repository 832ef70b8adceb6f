"""What only a GPU can show: its number format, its memory, its kernels in real passes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench.models import SHAPES, build, job, prompts
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reference.peak import peak_bytes
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.engine.memory import MemoryPlan
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import AtlasJob, TraceJob, TraceRequest
from reltrace_worker.types.results import JobResult

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 1 << 20


@pytest.fixture(scope="module")
def wide() -> LoadedModel:
    """Some layers of a real shape, in the format and with the kernel that a GPU serves."""
    return build(replace(SHAPES["1b"], layers=6, vocab_size=32_000), torch.bfloat16, "cuda")


@pytest.fixture
def room() -> Iterator[Any]:
    """Give torch so many bytes more than it holds now."""
    device = torch.device("cuda", torch.cuda.current_device())

    def leave(more: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_allocated(device) + more) / total
        torch.cuda.set_per_process_memory_fraction(share, device)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


def mixed(loaded: LoadedModel, count: int, longest: int = 256) -> list[TraceJob]:
    return [job(ids) for ids in prompts(count, 8, longest, loaded.shape.vocab_size, seed=3)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["grouped", "llama3_rope", *FAMILY_RECIPES])
def test_float32_gives_the_numbers_of_a_cpu(checkpoints: Checkpoints, name: str, rule: str) -> None:
    """
    Given one checkpoint on a CPU, where the numbers are proven, and on a GPU
    If prompts are traced at every site, in one pack
    I expect the same numbers, within 1e-4 of each layer's largest.
    """
    folder = str(checkpoints.folder(name))
    here, there = (load_model(folder, dtype="float32", device=d) for d in ("cpu", "cuda"))
    specs = [TraceRequest(p, tuple(SITES), "full", rule=rule) for p in PROMPTS]
    results = (run(Engine(m, "off"), prepare(m, *specs)) for m in (here, there))
    for wanted, found in zip(*results, strict=True):
        assert [t.token_id for t in found.targets] == [t.token_id for t in wanted.targets]
        for ours, theirs in zip(found.tensors, wanted.tensors, strict=True):
            per_layer = theirs.values.reshape(-1, *theirs.values.shape[-2:]).flatten(1)
            error = (ours.values.reshape(per_layer.shape) - per_layer).abs().amax(1)
            assert bool((error <= 1e-4 * per_layer.abs().amax(1)).all()), ours.site


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3"])
def test_bfloat16_runs_in_the_kernel_of_variable_length(
    checkpoints: Checkpoints, name: str, checkpointing: Any
) -> None:
    exact = load_model(str(checkpoints.folder(name)), dtype="float32", device="cpu")
    rough = load_model(str(checkpoints.folder(name)), dtype="bfloat16", device="cuda")
    engine = Engine(rough, checkpointing)
    assert engine.attention == "varlen"
    specs = [TraceRequest(p, ("embed", "resid", "neuron"), "full") for p in PROMPTS[:6]]
    wanted = run(Engine(exact, "off"), prepare(exact, *specs))
    for found, reference in zip(run(engine, prepare(rough, *specs)), wanted, strict=True):
        if found.targets[0].token_id != reference.targets[0].token_id:
            # Random weights: the two largest logits may be closer than bfloat16 can tell.
            continue
        for ours, theirs in zip(found.tensors, reference.tensors, strict=True):
            pair = torch.stack([ours.values.flatten(), theirs.values.flatten()])
            assert float(torch.corrcoef(pair)[0, 1]) > 0.95, ours.site


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sites", [("resid",), tuple(SITES)])
def test_a_pass_needs_no_more_memory_than_planned(
    wide: LoadedModel, sites: tuple[str, ...], checkpointing: bool
) -> None:
    jobs = [replace(each, sites=sites) for each in mixed(wide, 30)]
    engine = Engine(wide, "on" if checkpointing else "off")
    run(engine, jobs)
    peak = peak_bytes(wide, lambda: run(engine, jobs))
    need = MemoryPlan(wide).trace_bytes(jobs, checkpointing)
    assert peak <= 1.05 * need + MIB
    assert need < 4 * peak


@pytest.mark.parametrize("other", ["off", "on"])
def test_the_same_pack_gives_the_same_bits(wide: LoadedModel, other: Any) -> None:
    """Also of long prompts, parts of which end in any order, and with checkpointing."""
    jobs = [job(ids) for ids in prompts(5, 300, 2000, wide.shape.vocab_size, seed=4)]
    first, second = (run(Engine(wide, how), jobs) for how in ("off", other))
    for left, right in zip(first, second, strict=True):
        assert left.targets == right.targets
        assert torch.equal(left.tensors[0].values, right.tensors[0].values)


def test_an_atlas_is_the_same_wherever_it_is_made(wide: LoadedModel) -> None:
    lengths = prompts(12, 8, 900, wide.shape.vocab_size, seed=5)
    asked = [replace(job(ids), sites=("neuron",)) for ids in lengths]
    corpus = AtlasJob(tuple(asked), tuple(range(len(asked))), (), 4)
    found = []
    for how in ("off", "on"):
        engine = Engine(wide, how)  # type: ignore[arg-type]
        atlas = engine.begin([corpus])
        assert isinstance(atlas, Atlas)
        while not atlas.finished:
            engine.advance(atlas)
        found.append(atlas.tensors())
    for left, right in zip(*found, strict=True):
        assert (left.site, left.part) == (right.site, right.part)
        assert torch.equal(left.values, right.values), (left.site, left.part)


def test_memory_that_runs_out_costs_a_smaller_pack_and_no_job(wide: LoadedModel, room: Any) -> None:
    """
    Given less memory than a pass over all jobs takes, which nobody has planned for
    If they are traced together
    I expect every job's numbers, and a device that works on.
    """
    jobs = mixed(wide, 24)
    engine = Engine(wide, "off")
    wanted = run(engine, jobs)
    peak = peak_bytes(wide, lambda: run(engine, jobs))
    room(peak // 2)
    for found, reference in zip(run(Engine(wide, "off"), jobs), wanted, strict=True):
        values, theirs = found.tensors[0].values, reference.tensors[0].values
        error = (values - theirs).abs().amax(1) / theirs.abs().amax(1)
        assert float(error.max()) < 5e-2


def test_a_job_that_can_not_fit_fails_alone(wide: LoadedModel, room: Any) -> None:
    engine = Engine(wide)
    long, short = job(list(range(6000))), job([3, 1, 4, 1, 5])
    room(200 * MIB)
    failed, done = engine.run([long, short])
    assert isinstance(failed, EngineError)
    assert "does not fit into memory" in str(failed)
    assert isinstance(done, JobResult)


def test_a_pass_leaves_no_memory_behind(wide: LoadedModel) -> None:
    engine, jobs = Engine(wide, "off"), mixed(wide, 8)
    run(engine, jobs)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run(engine, jobs)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < MIB
