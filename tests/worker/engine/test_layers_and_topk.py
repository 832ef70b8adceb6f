"""A subset of layers, and the largest values of each, against the whole trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.recorder import RelevanceRecorder
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult

PER_LAYER = [name for name, site in SITES.items() if site.per_layer]
quick = settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def parts(result: JobResult, trace: int, site: str) -> dict[str, torch.Tensor]:
    return {t.part: t.values for t in result.tensors if (t.trace, t.site) == (trace, site)}


@quick
@given(
    layers=st.permutations(range(4)).flatmap(
        lambda order: st.integers(1, 4).map(lambda n: tuple(order[:n]))
    ),
    sites=st.lists(st.sampled_from(sorted(SITES)), min_size=1, max_size=4, unique=True),
    reduction=st.sampled_from(["token", "feature", "full"]),
    checkpointing=st.sampled_from(["on", "off"]),
)
def test_a_subset_of_layers_is_that_part_of_all(
    checkpoints: Checkpoints,
    layers: tuple[int, ...],
    sites: list[str],
    reduction: str,
    checkpointing: Any,
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, checkpointing)
    targets = (TargetRequest(), TargetRequest(position=2))
    whole, part = (
        TraceRequest(PROMPTS[0], tuple(sites), reduction, targets, layers=chosen)
        for chosen in ((), layers)
    )
    # In packs of their own: together, the whole trace would keep the backward from stopping.
    (expected,) = run(engine, prepare(loaded, whole))
    (result,) = run(engine, prepare(loaded, part))
    assert len(result.tensors) == len(expected.tensors)
    for ours, wanted in zip(result.tensors, expected.tensors, strict=True):
        values = wanted.values[list(layers)] if SITES[wanted.site].per_layer else wanted.values
        assert torch.equal(ours.values, values), ours.site


@quick
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    k=st.sampled_from([1, 2, 7, 100, 4096]),
    site=st.sampled_from(sorted(SITES)),
    checkpointing=st.sampled_from(["on", "off"]),
)
def test_topk_finds_the_largest_of_the_full_trace(
    checkpoints: Checkpoints, lengths: list[int], k: int, site: str, checkpointing: Any
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, checkpointing)
    prompts = [tuple(range(5 + i, 5 + i + n)) for i, n in enumerate(lengths)]
    topk = prepare(loaded, *(TraceRequest(p, (site,), "topk", k=k) for p in prompts))
    full = prepare(loaded, *(TraceRequest(p, (site,), "full") for p in prompts))
    for ours, wanted in zip(run(engine, topk), run(engine, full), strict=True):
        (whole,) = (tensor.values for tensor in wanted.tensors)
        whole = whole if SITES[site].per_layer else whole[None]
        found = parts(ours, 0, site)
        assert [found[name].dtype for name in ("values", "token", "feature")] == [
            torch.float32,
            torch.int32,
            torch.int32,
        ]
        count = min(k, whole[0].numel())
        for layer, relevance in enumerate(whole):
            values, token, feature = (
                part if not SITES[site].per_layer else part[layer]
                for part in (found["values"], found["token"], found["feature"])
            )
            assert values.shape == (count,)
            # Of equal sizes any may come first; what stands there is its own value.
            assert torch.equal(relevance[token.long(), feature.long()], values)
            places = token.long() * relevance.shape[-1] + feature
            assert len(set(places.tolist())) == count
            largest = relevance.abs().flatten().sort(descending=True).values[:count]
            assert torch.equal(values.abs(), largest)


def test_jobs_of_one_pack_choose_their_own_layers_and_k(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    specs = [
        TraceRequest(PROMPTS[0], ("resid", "neuron"), "topk", layers=(3,), k=3),
        TraceRequest(PROMPTS[1], ("resid",), "topk", k=50),
        TraceRequest(PROMPTS[3], ("head", "embed"), layers=(1, 0)),
        TraceRequest(PROMPTS[3], ("resid",), "full"),
    ]
    jobs = prepare(loaded, *specs)
    for job, packed in zip(jobs, run(Engine(loaded, "off"), jobs), strict=True):
        (alone,) = run(Engine(loaded, "off"), [job])
        assert len(packed.tensors) == len(alone.tensors)
        for ours, wanted in zip(packed.tensors, alone.tensors, strict=True):
            assert ours.values.shape == wanted.values.shape
            if ours.values.is_floating_point():
                size = float(wanted.values.abs().max())
                assert float((ours.values - wanted.values).abs().max()) <= 1e-5 * size
    assert [t.values.shape for t in run(Engine(loaded), jobs)[0].tensors] == [(1, 3)] * 6


@pytest.mark.parametrize(
    ("sites", "layers", "bottom"),
    [
        (("resid",), (), 1),
        (("resid",), (3,), 4),
        (("resid",), (2, 3), 3),
        (("head",), (2, 3), 2),
        (("resid", "mlp_out"), (2,), 2),
        (("resid", "embed"), (3,), 0),
    ],
)
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_the_backward_stops_at_the_lowest_layer(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    sites: tuple[str, ...],
    layers: tuple[int, ...],
    bottom: int,
    checkpointing: Any,
) -> None:
    """
    Given a job that asks for high layers alone
    If it is traced
    I expect no gradient in any module of the layers below, and in none of the layers from there
    to be missing.
    """
    loaded = checkpoints.loaded("grouped")
    jobs = prepare(loaded, TraceRequest(PROMPTS[0], sites, layers=layers))
    assert RelevanceRecorder(loaded, PackedBatch.of(jobs)).bottom == bottom
    seen: set[int] = set()
    decoder_layers = loaded.family.decoder_layers(loaded.model)
    handles = []
    for index, layer in enumerate(decoder_layers):

        def watch(_: Any, __: Any, output: torch.Tensor, index: int = index) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: seen.add(index))

        handles.append(layer.get_submodule("mlp.down_proj").register_forward_hook(watch))
    try:
        run(Engine(loaded, checkpointing), jobs)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == set(range(bottom, len(decoder_layers)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (0, 4)}, r"layers\[1\]: layer 4 does not exist; allowed: 0 to 3"),
        ({"layers": (2, 2)}, r"layers\[1\]: layer 2 is named twice"),
        ({"reduction": "topk"}, "top_k: is 0; with the reduction 'topk', allowed: 1 to 4096"),
        ({"reduction": "topk", "k": 4097}, "top_k: is 4097"),
        ({"k": 3}, "top_k: is for the reduction 'topk', not 'token'"),
    ],
)
def test_layers_and_k_that_can_not_be_are_refused(
    checkpoints: Checkpoints, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidJob, match=f"^{message}"):
        prepare(checkpoints.loaded("grouped"), TraceRequest("I", **fields))
