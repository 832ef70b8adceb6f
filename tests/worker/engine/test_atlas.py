"""The atlas of a corpus: what its full traces say, and the same however it is cut into slices."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from reference.checkpoints import RECIPES
from reference.gradient import gradient_times_input
from reference.loaded import DEVICE, PROMPTS, Checkpoints, prepare, preparer, run
from reference.strongest import by_hand, listed, sums
from reltrace_worker.engine import Engine
from reltrace_worker.engine.atlas import PASS_TOKENS, Atlas
from reltrace_worker.engine.memory import MemoryPlan
from reltrace_worker.engine.site_atlas import places_of, values_of
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError, InvalidJob
from reltrace_worker.types.jobs import (
    AtlasJob,
    AtlasRequest,
    TargetRequest,
    Term,
    TraceJob,
    TraceRequest,
)
from reltrace_worker.types.results import JobResult


def corpus(prompts: list[TraceJob], first: int = 0, k: int = 3) -> AtlasJob:
    return AtlasJob(tuple(prompts), tuple(range(first, first + len(prompts))), (), k)


def begun(engine: Engine, of: AtlasJob) -> Atlas:
    atlas = engine.begin([of])
    assert isinstance(atlas, Atlas)
    return atlas


def made(engine: Engine, of: AtlasJob) -> Atlas:
    atlas = begun(engine, of)
    while not atlas.finished:
        engine.advance(atlas)
    return atlas


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_slice_is_what_its_full_traces_say(checkpoints: Checkpoints, checkpointing: str) -> None:
    """
    Given prompts of several lengths, in one pass
    I expect every list to be the strongest places of the prompts' full traces, bit for bit.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, checkpointing)  # type: ignore[arg-type]
    prompts = prepare(loaded, *(TraceRequest(prompt) for prompt in PROMPTS))
    atlas = made(engine, corpus(prompts))
    for site in ("neuron", "head"):
        full = [TraceRequest(p, sites=(site,), reduction="full") for p in PROMPTS]
        traces = [result.tensors[0].values for result in run(engine, prepare(loaded, *full))]
        places = torch.cat(
            [(number << 16) + torch.arange(trace.shape[1]) for number, trace in enumerate(traces)]
        )
        every = torch.cat(traces, 1)
        for layer in range(loaded.shape.layers):
            for which, sign in (("relevance+", 1), ("relevance-", -1)):
                expected = by_hand(sign * every[layer], places, 3)
                assert listed(atlas.sites[site], layer, which) == expected
        torch.testing.assert_close(
            sums(atlas.sites[site])[:, 0].cpu(),
            every.double().sum(1),
            rtol=1e-6,
            atol=1e-9,
        )


def test_activations_are_those_that_hooks_see(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    prompts = prepare(loaded, *(TraceRequest(prompt) for prompt in PROMPTS))
    atlas = made(Engine(loaded, "off"), corpus(prompts, k=1))
    seen: dict[str, list[torch.Tensor]] = {"neuron": [], "head": []}
    layer = loaded.model.model.layers[2]
    handles = [
        module.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0][0]))
        for module, own in (
            (layer.mlp.down_proj, seen["neuron"]),
            (layer.self_attn.o_proj, seen["head"]),
        )
    ]
    with torch.no_grad():
        for job in prompts:
            loaded.model(torch.tensor([job.token_ids], device=loaded.device))
    for handle in handles:
        handle.remove()
    neurons = torch.cat(seen["neuron"])
    heads = torch.cat(seen["head"]).unflatten(-1, (loaded.shape.heads, -1)).norm(dim=-1)
    for site, values in (("neuron", neurons), ("head", heads)):
        strongest = values_of(atlas.sites[site].strongest[2, 2, 0])
        torch.testing.assert_close(
            strongest, values.max(0).values.clamp(min=0), rtol=1e-4, atol=1e-5
        )
    assert not atlas.sites["head"].strongest[:, 3].any()


def test_passes_do_not_depend_on_memory_or_workers(checkpoints: Checkpoints) -> None:
    """
    Given a corpus of several passes
    If it is made in one slice, and by another engine in slices that end where passes do
    I expect the same bits, once the slices are merged.
    """
    loaded = checkpoints.loaded("grouped")
    torch.manual_seed(5)
    long = [
        TraceRequest(tuple(torch.randint(10, 200, (int(n),)).tolist()))
        for n in torch.randint(40, 120, (60,))
    ]
    prompts = prepare(loaded, *long)
    whole = made(Engine(loaded, "off"), corpus(prompts))
    passes = engine_passes(prompts)
    assert len(passes) > 1
    other = Engine(loaded, "on")
    parts = [made(other, corpus(prompts[p[0] : p[-1] + 1], first=p[0])) for p in passes]
    for site, atlas in whole.sites.items():
        keys = torch.cat([part.sites[site].strongest for part in reversed(parts)], 2)
        assert torch.equal(keys.topk(3, dim=2).values, atlas.strongest)
        torch.testing.assert_close(
            sum(sums(part.sites[site]) for part in parts), sums(atlas), rtol=0, atol=0
        )
        assert torch.equal(sum(part.sites[site].histogram for part in parts), atlas.histogram)


def engine_passes(prompts: list[TraceJob]) -> list[list[int]]:
    """Cut prompts as the page says: in their order, up to so many tokens."""
    passes: list[list[int]] = [[]]
    for index, job in enumerate(prompts):
        held = sum(len(prompts[i].token_ids) for i in passes[-1])
        if passes[-1] and held + len(job.token_ids) > PASS_TOKENS[DEVICE]:
            passes.append([])
        passes[-1].append(index)
    return passes


NEXT = AtlasRequest(
    tuple(p for p in PROMPTS if isinstance(p, str)), positions=1 << 16, rule="gradient", k=3
)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "deep"])
def test_all_next_tokens_are_explained_in_one_pass(checkpoints: Checkpoints, recipe: str) -> None:
    """
    Given prompts that explain their own next tokens, at all positions, by plain gradients
    I expect what autograd gives of the sum of these logits, at all places but the first.
    """
    loaded = checkpoints.loaded(recipe)
    of = preparer(loaded).prepare(NEXT)
    assert all(len(job.targets) == 1 and job.only_terms for job in of.prompts)
    atlas = made(Engine(loaded, "off"), of)
    for site in ("neuron", "head"):
        traces, places = [], []
        for number, job in enumerate(of.prompts):
            ids = torch.tensor(job.token_ids, device=loaded.device)

            def scalar(logits: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
                # The first token is not counted, and not what it predicts either.
                return logits[1:-1].gather(1, ids[2:, None]).sum()

            full = gradient_times_input(loaded.model, job.token_ids, scalar).values[site]
            traces.append(full[:, 1:])
            places.append((number << 16) + torch.arange(1, len(ids)))
        every, at = torch.cat(traces, 1), torch.cat(places)
        torch.testing.assert_close(
            sums(atlas.sites[site])[:, 0].cpu(), every.double().sum(1), rtol=1e-4, atol=1e-5
        )
        for layer in range(loaded.shape.layers):
            strongest = values_of(atlas.sites[site].strongest[layer, 0])
            expected = by_hand(every[layer], at, 1)
            for feature, (found,) in enumerate(expected):
                assert float(strongest[0, feature]) == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_positions_are_drawn_by_the_prompt_and_the_seed(checkpoints: Checkpoints) -> None:
    """
    Given positions that are drawn
    I expect so many of each prompt, the same ones in whichever slice it is, others by another seed;
    and of a prompt that has fewer, all.
    """
    jobs = preparer(checkpoints.loaded("grouped"))

    def drawn(*prompts: str, seed: int = 0) -> list[tuple[Term, ...]]:
        of = jobs.prepare(AtlasRequest(prompts, k=1, positions=4, seed=seed))
        return [job.targets[0].terms for job in of.prompts]

    long, other, short = PROMPTS[0], "We sing all day. The cats play all day.", "cats"
    assert isinstance(long, str)
    (first, second, few) = drawn(long, other, short)
    assert drawn(other, long) == [second, first]
    assert drawn(long, seed=1) != [first]
    (job,) = prepare(checkpoints.loaded("grouped"), TraceRequest(long))
    for terms in (first, second):
        positions = [term.position for term in terms]
        assert len(set(positions)) == 4
        assert positions == sorted(positions)
        assert positions[0] > 0
    assert all(term.token_id == job.token_ids[term.position + 1] for term in first)
    (job,) = prepare(checkpoints.loaded("grouped"), TraceRequest(short))
    assert [term.position for term in few] == list(range(1, len(job.token_ids) - 1))[:4]


def test_special_and_first_tokens_are_counted_on_request(checkpoints: Checkpoints) -> None:
    """
    Given prompts with a special token in them
    I expect lists, sums and histograms without it and without the first token, and with both where
    that is asked for; and that neither it nor what it predicts is explained.
    """
    loaded = checkpoints.loaded("grouped")
    mark = min(Vocabulary(loaded.tokenizer).special_ids)
    text = loaded.tokenizer.convert_ids_to_tokens(mark)
    prompts = (f"I have 5 cats{text} and 3 dogs", "The quick brown fox")
    for keep in (False, True):
        request = AtlasRequest(prompts, k=64, positions=99, keep_special=keep)
        of = preparer(loaded).prepare(request)
        ids = of.prompts[0].token_ids
        at = ids.index(mark, 1)
        counted = [i for i in range(len(ids)) if keep or i not in (0, at)]
        explained = [t.position for t in of.prompts[0].targets[0].terms]
        assert explained == [i for i in counted[:-1] if keep or i + 1 != at]
        atlas = made(Engine(loaded, "off"), of)
        places = [*counted, *((1 << 16) + i for i in range(not keep, len(of.prompts[1].token_ids)))]
        for site in atlas.sites.values():
            assert (site.histogram.sum(-1) == len(places)).all()
            found = places_of(site.strongest[:, 2])
            assert set(found[found >= 0].tolist()) == set(places)
        parts = {tensor.part for tensor in atlas.tensors() if tensor.site == "corpus"}
        assert parts == {"token_ids", "lengths"}


def test_a_prompt_without_a_next_token_is_left_out(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    bare = loaded.tokenizer.convert_ids_to_tokens(40)
    request = AtlasRequest((bare, "The quick"), k=1, positions=1)
    of = preparer(loaded).prepare(request)
    assert of.numbers == (1,)
    ((number, why),) = of.skipped
    assert number == 0
    assert "none of them follows one that is counted" in why
    with pytest.raises(InvalidJob, match=r"targets: are the prompts' own next tokens"):
        preparer(loaded).prepare(replace(request, targets=(TargetRequest(token=3),)))


def test_a_slice_says_which_tokens_it_has(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    prompts = prepare(loaded, TraceRequest(PROMPTS[0]), TraceRequest(PROMPTS[3]))
    of = AtlasJob(tuple(prompts), (0, 2), ((1, "is empty"),), 2)
    engine = Engine(loaded, "off")
    parts = {(t.site, t.part): t.values for t in made(engine, of).tensors()}
    lengths = [len(job.token_ids) for job in prompts]
    assert parts["corpus", "lengths"].tolist() == [lengths[0], 0, lengths[1]]
    assert parts["corpus", "token_ids"].tolist() == [i for job in prompts for i in job.token_ids]
    explained = [result.targets[0].token_id for result in run(engine, prompts)]
    assert parts["corpus", "targets"].tolist() == [explained[0], -1, explained[1]]
    assert set(parts) == {
        *(("corpus", part) for part in ("lengths", "token_ids", "targets")),
        *(
            (site, part)
            for site in ("neuron", "head")
            for part in ("strongest", "beside", "high", "low", "histogram")
        ),
    }


def test_what_nobody_waits_for_goes_on_no_more(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    atlas = begun(Engine(loaded, "off"), corpus(prepare(loaded, TraceRequest(PROMPTS[0]))))
    atlas.cancel()
    assert atlas.finished


def test_numbers_that_are_not_finite_are_an_error(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(EngineError, match="is not finite, or too large for an atlas"):
            made(engine, corpus(prepare(loaded, TraceRequest(PROMPTS[0]))))
    finally:
        with torch.no_grad():
            weight[0, 0] = before


def test_an_atlas_says_whether_its_passes_were_checkpointed(checkpoints: Checkpoints) -> None:
    """
    Given a limit on memory that a pass keeps to by checkpointing alone, and one for nothing
    I expect the result to say so, or an error that names the pass and not one of its prompts.
    """
    loaded = checkpoints.loaded("deep")
    prompts = prepare(loaded, *(TraceRequest(prompt, sites=("neuron",)) for prompt in PROMPTS))
    model = MemoryPlan(loaded)
    keeping, checkpointed = (model.trace_bytes(prompts, mode) for mode in (False, True))
    assert checkpointed < keeping - 1
    for limit, said in ((keeping, False), (keeping - 1, True)):
        engine = Engine(loaded, memory_bytes=limit)
        result = made(engine, corpus(prompts)).take_outcomes()[0]
        assert isinstance(result, JobResult)
        assert result.checkpointing is said
    tokens = sum(len(job.token_ids) for job in prompts)
    engine = Engine(loaded, memory_bytes=checkpointed - 1)
    atlas = begun(engine, corpus(prompts))
    with pytest.raises(EngineError, match=f"^a pass of {len(prompts)} prompts of {tokens} tokens"):
        engine.advance(atlas)


def test_tables_that_do_not_fit_are_refused_before_the_first_pass(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("deep")
    (prompt,) = prepare(loaded, TraceRequest("a", sites=("neuron",)))
    empty = Atlas(loaded, corpus([prompt], k=64)).sites.values()
    size = sum(getattr(one, part.name).nbytes for one in empty for part in fields(one))
    assert Atlas.table_bytes(loaded.shape, 64) == size
    engine = Engine(loaded, memory_bytes=size - 1)
    with pytest.raises(EngineError, match=f"an atlas of 64 places does not .* needs {size} bytes"):
        begun(engine, corpus([prompt], k=64))


def test_nothing_comes_of_an_atlas_before_its_end_or_when_it_is_dropped(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    prompts = prepare(loaded, *(TraceRequest(prompt, sites=("neuron",)) for prompt in PROMPTS))
    atlas = begun(engine, corpus(prompts))
    assert atlas.take_outcomes() == {}
    atlas.cancel()
    engine.advance(atlas)
    assert atlas.finished
    assert atlas.take_outcomes() == {}


def test_a_contrast_that_is_the_largest_logit_names_the_prompt(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    traced = run(engine, prepare(loaded, *map(TraceRequest, PROMPTS[:2])))
    first, second = (result.targets[0].token_id for result in traced)
    assert first != second
    prompts = tuple(prompt for prompt in PROMPTS[:2] if isinstance(prompt, str))
    request = AtlasRequest(prompts, k=2, targets=(TargetRequest(contrast=second),))
    atlas = begun(engine, preparer(loaded).prepare(request))
    with pytest.raises(InvalidJob) as caught:
        engine.advance(atlas)
    (fault,) = caught.value.violations
    assert fault.field == "targets[0].contrast"
    assert fault.description.startswith("prompt 1 of the corpus: ")
