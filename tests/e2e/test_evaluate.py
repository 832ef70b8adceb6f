"""Which rule to trust, on the demo model, through the whole service."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
import torch
from e2e.conftest import Process
from reltrace_worker.demo import path as demo_path
from reltrace_worker.demo.corpus import held_out
from reltrace_worker.model import load_model

PROMPTS = [
    {"prompt": e.prompt, "target": e.answer, "answer": e.answer, "id": f"p{number}"}
    for number, e in enumerate(held_out(20, 3))
]


def by_hand(
    relevance: np.ndarray,
    counts: list[int],
    axis: list[float],
    logit: Callable[[list[int]], float],
) -> float:
    """Compute the area of one prompt: of trapezoids between points of an axis from 0 to 1."""
    order = sorted(range(len(relevance)), key=lambda i: (-relevance[i], i))
    most, least = ([logit(turned[:n]) for n in counts] for turned in (order, order[::-1]))
    heights = [b - a for a, b in zip(most, least, strict=True)]
    return sum(
        (a + b) / 2 * (right - left)
        for (a, b), (left, right) in zip(pairwise(heights), pairwise(axis), strict=True)
    )


def test_an_area_is_that_of_plain_forward_passes(demo_address: str) -> None:
    model = load_model(str(demo_path()), device="cpu").model
    with reltrace.Client(demo_address) as client:
        for item in PROMPTS[:3]:
            trace = client.trace(item["prompt"], target=item["target"], sites="embed")
            found = client.evaluate([item], rules=["attnlrp"], points=5)

            def logit(off: list[int], trace: reltrace.Trace = trace) -> float:
                with torch.no_grad():
                    embeddings = model.get_input_embeddings()(torch.tensor([trace.token_ids]))
                    embeddings[0, off] = 0
                    logits = model(inputs_embeds=embeddings).logits[0, -1]
                return float(logits[trace.target.token_id])

            shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
            counts = [int(np.floor(share * len(trace.tokens) + 0.5)) for share in shares]
            expected = by_hand(trace["embed"], counts, shares, logit)
            assert found.rules["attnlrp"].area.mean == pytest.approx(expected, abs=1e-3)
            assert found.rules["attnlrp"].most[0] == pytest.approx(trace.target.logit, abs=1e-4)


def test_an_area_of_neurons_is_that_of_plain_forward_passes(demo_address: str) -> None:
    model = load_model(str(demo_path()), device="cpu").model
    item, off_now = PROMPTS[0], torch.zeros(0, dtype=torch.long)
    width = model.config.intermediate_size

    def switch_off(layer: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(_: object, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (neurons,) = inputs
            here = off_now[off_now // width == layer] % width
            return (neurons.index_fill(-1, here, 0.0),)

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(switch_off(number))
    with reltrace.Client(demo_address) as client:
        trace = client.trace(
            item["prompt"], target=item["target"], sites="neuron", reduce="feature"
        )
        found = client.evaluate([item], site="neuron", rules=["attnlrp"], points=3)

    def logit(off: list[int]) -> float:
        nonlocal off_now
        off_now = torch.tensor(off, dtype=torch.long)
        with torch.no_grad():
            logits = model(torch.tensor([trace.token_ids])).logits[0, -1]
        return float(logits[trace.target.token_id])

    # 385 is 1 + half of 3 layers of 256 neurons; 7.27 its third root.
    counts = [0, 6, 52, 384]
    axis = [math.log(1 + count) / math.log(385) for count in counts]
    expected = by_hand(trace["neuron"].ravel(), counts, axis, logit)
    assert found.at.tolist() == counts
    assert found.rules["attnlrp"].area.mean == pytest.approx(expected, abs=1e-3)


def test_an_area_of_neurons_hardly_depends_on_the_number_of_points(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        few, many = (
            client.evaluate(PROMPTS[:5], site="neuron", rules=["attnlrp"], points=points)
            for points in (4, 20)
        )
    assert len(many.at) > 3 * len(few.at)
    assert few.rules["attnlrp"].area.mean == pytest.approx(
        many.rules["attnlrp"].area.mean, rel=0.03
    )


def test_rules_are_told_apart(demo_address: str) -> None:
    """
    Given sentences whose answer is known
    I expect AttnLRP to order tokens far better than chance and better than the gradient, a random
    order to be worth nothing, and the answer to be where AttnLRP sees it.
    """
    with reltrace.Client(demo_address) as client:
        found = client.evaluate(PROMPTS)
        again = client.evaluate(reversed(PROMPTS))
    assert (found.prompts, found.failures, found.model) == (20, {}, "reltrace-demo")
    scores = found.rules
    assert list(scores) == ["attnlrp", "cp_lrp", "gradient", "random"]
    assert scores["attnlrp"].area.mean - scores["attnlrp"].area.margin > (
        scores["gradient"].area.mean + scores["gradient"].area.margin
    )
    assert abs(scores["random"].area.mean) < 2 * scores["random"].area.margin
    assert found.best() == "attnlrp"
    hit, mass = scores["attnlrp"].hit, scores["attnlrp"].mass
    assert hit is not None
    assert mass is not None
    assert hit.mean > 0.9
    assert mass.mean > 0.5
    # Orders of chance belong to the prompt, not to its place in the file.
    assert again.rules["random"].area.mean == pytest.approx(scores["random"].area.mean, abs=1e-4)


def test_neurons_that_are_relevant_matter_more_than_others(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        found = client.evaluate(PROMPTS, site="neuron", rules=["attnlrp", "random"])
    relevant, chance = found.rules["attnlrp"].area, found.rules["random"].area
    assert relevant.mean - relevant.margin > chance.mean + chance.margin
    assert found.rules["attnlrp"].hit is None


def test_a_prompt_that_can_not_be_evaluated_costs_no_other(demo_address: str) -> None:
    bad = [
        {"prompt": "We have a dog", "answer": "zebra", "id": "absent"},
        {"prompt": "We have a dog", "target": "no such token", "id": "split"},
    ]
    with reltrace.Client(demo_address) as client:
        found = client.evaluate([*bad, *PROMPTS[:2]], rules=["gradient"])
    assert found.prompts == 2
    # In the order of the prompts, whichever fails first.
    assert list(found.failures) == ["absent", "split"]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"model": "nope"}, reltrace.ModelNotFound, "model: 'nope' is not served"),
        ({"rules": ["attnlrp", "lrp"]}, reltrace.InvalidArgument, "rules: 'lrp' is not one of"),
        ({"target": "no token"}, reltrace.InvalidArgument, "target: 'no token' is not exactly one"),
    ],
)
def test_what_no_prompt_can_have_is_raised(
    wrong: dict[str, Any], error: type[Exception], said: str, demo_address: str
) -> None:
    with (
        reltrace.Client(demo_address) as client,
        pytest.raises(error, match=f"^{said}"),
    ):
        client.evaluate(["We have a dog", "We have a cat"], **wrong)


def test_the_command_prints_a_table_and_draws_a_picture(
    demo_address: str, start: Callable[..., Process], tmp_path: Path
) -> None:
    source, picture = tmp_path / "prompts.jsonl", tmp_path / "curves.png"
    source.write_text('"We have a dog"\n' + "".join(json.dumps(p) + "\n" for p in PROMPTS[:4]))
    options = ("evaluate", str(source), "--server", demo_address, "--plot", str(picture))
    shown = start("reltrace", *options)
    output, _ = shown.popen.communicate(timeout=60)
    assert shown.popen.returncode == 0, shown.errors.read_text()
    assert "reltrace-demo: 5 prompts, tokens switched off" in output
    for rule in ("attnlrp", "cp_lrp", "gradient", "random"):
        assert rule in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain = start("reltrace", *options[:4], "--json", "--rule", "gradient")
    (line,) = plain.popen.communicate(timeout=60)[0].splitlines()
    assert json.loads(line)["rules"]["gradient"]["area"]["count"] == 5
