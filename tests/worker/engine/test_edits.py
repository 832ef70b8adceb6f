"""Edits of the forward pass, against torch hooks on the model as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import Edit, TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult

CHECKPOINTING: list[Any] = ["on", "off"]


@contextmanager
def hooked(
    loaded: LoadedModel, layer: int, path: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Change the input (a path that ends in <) or the output of a module by hand."""
    module = loaded.model.model.layers[layer].get_submodule(path.removesuffix("<"))

    def before(_: Any, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = (
        module.register_forward_pre_hook(before)
        if path.endswith("<")
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def plain_logits(loaded: LoadedModel, ids: tuple[int, ...], *hooks: Any) -> torch.Tensor:
    with torch.no_grad(), ExitStack() as stack:
        for layer, path, change in hooks:
            stack.enter_context(hooked(loaded, layer, path, change))
        logits: torch.Tensor = loaded.model(torch.tensor([ids], device=loaded.device)).logits[0, -1]
        return logits


def setting(rows: Any, columns: Any, scale: float, value: float) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, rows, columns] = x[0, rows, columns] * scale + value
        return x

    return change


def job(loaded: LoadedModel, *edits: Edit, **options: Any) -> Any:
    """A job whose target is token 7 at the last position."""
    spec = TraceRequest(PROMPTS[0], targets=(TargetRequest(token=7),), edits=edits, **options)
    (prepared,) = prepare(loaded, spec)
    return prepared


def logit(result: JobResult) -> float:
    return result.targets[0].logit


ALL = slice(None)


@pytest.mark.parametrize(
    ("edit", "hook"),
    [
        (
            Edit("neuron", 1, features=(3, 5), scale=0.0),
            (1, "mlp.down_proj<", setting(ALL, [3, 5], 0, 0)),
        ),
        (
            Edit("neuron", 0, features=(2,), positions=(1, -1), scale=0.0, value=4.0),
            (0, "mlp.down_proj<", setting([1, -1], 2, 0, 4.0)),
        ),
        (
            Edit("resid", 2, features=(0, 7), scale=-2.0),
            (2, "", setting(ALL, [0, 7], -2, 0)),
        ),
        (
            Edit("resid", 1, positions=(0,), scale=0.0, value=0.5),
            (1, "", setting(0, ALL, 0, 0.5)),
        ),
        (
            Edit("mlp_out", 1, positions=(2,), scale=0.0),
            (1, "mlp", setting(2, ALL, 0, 0)),
        ),
    ],
)
def test_an_edit_is_what_a_hook_would_do(checkpoints: Checkpoints, edit: Edit, hook: Any) -> None:
    loaded = checkpoints.loaded("grouped")
    prepared = job(loaded, edit, sites=())
    (result,) = run(Engine(loaded, "off"), [prepared])
    expected = plain_logits(loaded, prepared.token_ids, hook)[7]
    untouched = plain_logits(loaded, prepared.token_ids)[7]
    assert abs(expected - untouched) > 1e-4
    assert logit(result) == pytest.approx(float(expected), abs=2e-5)


def test_a_head_is_its_columns(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    prepared = job(loaded, Edit("head", 1, (2,), scale=0.0), sites=())
    (result,) = run(Engine(loaded, "off"), [prepared])
    size = loaded.model.model.layers[1].self_attn.o_proj.in_features // loaded.shape.heads
    columns = slice(2 * size, 3 * size)
    hook = (1, "self_attn.o_proj<", setting(ALL, columns, 0, 0))
    expected = plain_logits(loaded, prepared.token_ids, hook)[7]
    assert logit(result) == pytest.approx(float(expected), abs=2e-5)


def test_a_direction_is_added(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    torch.manual_seed(3)
    direction = torch.randn(loaded.shape.hidden_size)
    edit = Edit("resid", 1, direction=tuple(direction.tolist()))
    prepared = job(loaded, edit, sites=())
    (result,) = run(Engine(loaded, "off"), [prepared])
    expected = plain_logits(
        loaded, prepared.token_ids, (1, "", lambda x: x + direction.to(x.device))
    )[7]
    assert logit(result) == pytest.approx(float(expected), abs=2e-5)


def test_the_embedding_of_a_token_is_switched_off(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("tied")
    prepared = job(loaded, Edit("embed", positions=(2,), scale=0.0), sites=())
    (result,) = run(Engine(loaded, "off"), [prepared])
    with torch.no_grad():
        embeddings = loaded.model.get_input_embeddings()(
            torch.tensor([prepared.token_ids], device=loaded.device)
        )
        embeddings[0, 2] = 0
        expected = loaded.model(inputs_embeds=embeddings).logits[0, -1, 7]
    assert logit(result) == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("recipe", ["tied", "gemma3"])
def test_the_mean_embedding_is_that_of_the_vocabulary(
    checkpoints: Checkpoints, recipe: str
) -> None:
    """Gemma's has the factor that its embeddings are multiplied by."""
    loaded = checkpoints.loaded(recipe)
    beside = job(loaded, Edit("embed", positions=(0,), scale=2.0), sites=())
    mean = Edit("embed", positions=(1, 3), scale=0.0, mean=True)
    prepared = job(loaded, mean, sites=())
    _, result = run(Engine(loaded, "off"), [beside, prepared])
    with torch.no_grad():
        embed = loaded.model.get_input_embeddings()
        embeddings = embed(torch.tensor([prepared.token_ids], device=loaded.device))
        factor = float(embeddings[0, 0, 0] / embed.weight[prepared.token_ids[0], 0])
        embeddings[0, [1, 3]] = embed.weight.mean(0) * factor
        expected = loaded.model(inputs_embeds=embeddings).logits[0, -1, 7]
        untouched = plain_logits(loaded, prepared.token_ids)[7]
    assert (factor > 2) == (recipe == "gemma3")
    assert abs(expected - untouched) > 1e-3
    assert logit(result) == pytest.approx(float(expected), abs=5e-5)


def test_edits_are_made_in_their_order(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    set_then_double = (
        Edit("neuron", 1, (4,), scale=0.0, value=3.0),
        Edit("neuron", 1, (4,), scale=2.0),
    )
    outcomes = []
    for edits in (set_then_double, set_then_double[::-1]):
        (result,) = run(Engine(loaded, "off"), [job(loaded, *edits, sites=())])
        outcomes.append(logit(result))
    ids = job(loaded).token_ids
    for found, value in zip(outcomes, (6.0, 3.0), strict=True):
        hook = (1, "mlp.down_proj<", setting(ALL, 4, 0, value))
        assert found == pytest.approx(float(plain_logits(loaded, ids, hook)[7]), abs=2e-5)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_jobs_of_a_pack_do_not_feel_each_others_edits(
    checkpoints: Checkpoints, checkpointing: Any
) -> None:
    """
    Given jobs with edits of several sites, and one without, in one pack
    I expect each to have the traces that it has alone.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, checkpointing)
    sites = ("embed", "resid", "neuron", "head")
    jobs = [
        job(loaded, sites=sites),
        job(loaded, Edit("neuron", 0, (1, 2), (0,), 0.0, 1.0), sites=sites),
        job(loaded, Edit("embed", positions=(1,), scale=0.0), sites=sites),
        job(
            loaded,
            Edit("resid", 3, (5,), scale=0.5),
            Edit("neuron", 0, scale=0.9),
            sites=sites,
        ),
    ]
    together = run(engine, jobs)
    for alone, result in zip((run(engine, [one])[0] for one in jobs), together, strict=True):
        assert logit(alone) == pytest.approx(logit(result), abs=1e-5)
        for ours, wanted in zip(result.tensors, alone.tensors, strict=True):
            torch.testing.assert_close(ours.values, wanted.values, rtol=1e-3, atol=1e-5)
    assert len({round(logit(result), 4) for result in together}) == 4


@pytest.mark.parametrize("recipe", ["grouped", *FAMILY_RECIPES])
def test_the_stream_between_attention_and_mlp_is_changed_for_all_who_read_it(
    checkpoints: Checkpoints, recipe: str
) -> None:
    """
    Given an edit of the residual stream behind an attention
    I expect what transformers computes with as much added to the attention's output: the MLP and
    all layers above read the changed stream.
    """
    loaded = checkpoints.loaded(recipe)
    layer = loaded.shape.layers - 2
    edit = Edit("resid_mid", layer, features=(1, 4), scale=-2.0, value=0.5)
    prepared = job(loaded, edit, sites=())
    (result,) = run(Engine(loaded, "off"), [prepared])
    entered: list[torch.Tensor] = []

    def enter(x: torch.Tensor) -> torch.Tensor:
        entered[:] = [x]
        return x

    change = setting(ALL, [1, 4], -2.0, 0.5)
    hooks = (
        (layer, "<", enter),
        (layer, loaded.family.attention_out, lambda x: change(entered[0] + x) - entered[0]),
    )
    expected = plain_logits(loaded, prepared.token_ids, *hooks)[7]
    assert abs(expected - plain_logits(loaded, prepared.token_ids)[7]) > 1e-4
    assert logit(result) == pytest.approx(float(expected), abs=5e-5)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("site", SITES)
def test_an_edit_that_changes_nothing_leaves_all_relevance_as_it_is(
    checkpoints: Checkpoints, checkpointing: Any, rule: str, site: str
) -> None:
    """Nor does it where it names a feature twice, or where a job beside it has none."""
    loaded = checkpoints.loaded("grouped")
    layer = 0 if site == "embed" else 1
    options = {"sites": tuple(SITES), "reduction": "full", "rule": rule}
    plain = job(loaded, **options)
    edited = [
        job(loaded, Edit(site, layer, features, scale=1.0), **options)
        for features in ((), (3,), (3, 0, 3))
    ]
    wanted, *found = run(Engine(loaded, checkpointing), [plain, *edited])
    (alone,) = run(Engine(loaded, checkpointing), [plain])
    for result in (wanted, *found):
        for ours, one in zip(result.tensors, alone.tensors, strict=True):
            torch.testing.assert_close(ours.values, one.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("site", ["embed", "resid", "resid_mid", "attn_out", "mlp_out", "neuron"])
def test_relevance_is_that_of_the_edited_model_however_it_is_computed(
    checkpoints: Checkpoints, site: str
) -> None:
    loaded = checkpoints.loaded("grouped")
    layer = 0 if site == "embed" else 3
    edit = Edit(site, layer, features=(1,), scale=0.0, value=2.0)
    results = [
        run(Engine(loaded, mode), [job(loaded, edit, sites=tuple(SITES), reduction="full")])[0]
        for mode in CHECKPOINTING
    ]
    for kept, recomputed in zip(*(result.tensors for result in results), strict=True):
        torch.testing.assert_close(kept.values, recomputed.values, rtol=0, atol=0)


def test_what_was_set_to_zero_has_no_relevance_and_hides_what_is_below(
    checkpoints: Checkpoints,
) -> None:
    loaded = checkpoints.loaded("grouped")
    edit = Edit("resid", 1, scale=0.0, value=1.0)
    (result,) = run(
        Engine(loaded, "off"),
        [
            job(
                loaded,
                edit,
                Edit("neuron", 2, (3,), scale=0.0),
                sites=("resid", "neuron"),
                reduction="full",
                rule="gradient",
            )
        ],
    )
    resid, neuron = (tensor.values for tensor in result.tensors)
    assert not resid[0].any()
    assert resid[1].any()
    assert not neuron[2, :, 3].any()
    assert not neuron[:2].any()
    assert neuron[2].any()


def test_a_job_without_backward_gives_the_logits_of_a_trace(checkpoints: Checkpoints) -> None:
    """What the rules change is the backward pass alone."""
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    for rule in ("attnlrp", "cp_lrp", "gradient"):
        (traced,) = run(engine, [job(loaded, rule=rule)])
        (only,) = run(engine, [job(loaded, rule=rule, sites=())])
        assert logit(only) == logit(traced)
        assert only.tensors == ()
        plain = plain_logits(loaded, job(loaded).token_ids)[7]
        assert logit(only) == pytest.approx(float(plain), abs=2e-5)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit("nowhere"), r"edits\[0\]\.site: site 'nowhere' is unknown; allowed: embed"),
        (Edit("neuron", 99), r"edits\[0\]\.layer: layer 99 does not exist; allowed: 0 to 3"),
        (Edit("embed", 1), r"edits\[0\]\.layer: layer 1 does not exist; allowed: 0 to 0"),
        (Edit("head", 0, (99,)), r"edits\[0\]\.features\[0\]: head has no feature 99"),
        (Edit("resid", 0, (), (99,)), r"edits\[0\]\.positions\[0\]: position 99 is outside"),
        (Edit("resid", 0, direction=(1.0,)), r"edits\[0\]\.direction: has 1 values; resid"),
        (Edit("head", 0, direction=(1.0,)), r"edits\[0\]\.direction: is not for heads"),
        (Edit("resid", 0, mean=True), r"edits\[0\]\.mean: is for the site embed, not resid"),
        (Edit("embed", 0, (1,), mean=True), r"edits\[0\]\.features: is not for the mean"),
        (Edit("resid", 0, scale=float("nan")), r"edits\[0\]: has a number beyond what is all"),
    ],
)
def test_an_edit_that_can_not_be_names_its_field(
    checkpoints: Checkpoints, edit: Edit, said: str
) -> None:
    with pytest.raises(InvalidJob, match=said):
        job(checkpoints.loaded("grouped"), edit)
