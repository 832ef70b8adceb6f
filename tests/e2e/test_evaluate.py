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
from demo_model.corpus import held_out
from e2e.conftest import Process
from reltrace_worker.demo import path as demo_path
from reltrace_worker.models import load_model

PROMPTS = [
    {"prompt": e.prompt, "target": f" {e.answer}", "answer": e.answer, "id": f"p{number}"}
    for number, e in enumerate(held_out(20, 3))
]


def by_hand(
    relevance: np.ndarray,
    counts: list[int],
    axis: list[float],
    value: Callable[[list[int]], float],
    kept: tuple[int, ...] = (),
) -> float:
    """Compute the area of one prompt: of trapezoids between points of an axis from 0 to 1."""
    order = sorted(set(range(len(relevance))) - set(kept), key=lambda i: (-relevance[i], i))
    most, least = ([value(turned[:n]) for n in counts] for turned in (order, order[::-1]))
    heights = [b - a for a, b in zip(most, least, strict=True)]
    return sum(
        (a + b) / 2 * (right - left)
        for (a, b), (left, right) in zip(pairwise(heights), pairwise(axis), strict=True)
    )


def shares_of(tokens: int) -> list[int]:
    return [int(np.floor(share * tokens + 0.5)) for share in SHARES]


SHARES = [0, 0.2, 0.4, 0.6, 0.8, 1]
OTHER = " a"


@pytest.mark.parametrize(
    ("measure", "replace", "keep"),
    [
        ("logprob", "zero", "special"),
        ("logprob", "mean", "special"),
        ("logprob", OTHER, "special"),
        ("probability", "zero", "none"),
        ("logit", "zero", "none"),
    ],
)
@pytest.mark.parametrize("follows", ["", ", and"])
def test_an_area_is_that_of_plain_forward_passes(
    measure: Any, replace: str, keep: Any, follows: str, demo_address: str
) -> None:
    """Of one token that follows the prompt, and of several, which are measured together."""
    model = load_model(str(demo_path()), device="cpu").model
    embed = model.get_input_embeddings()
    with reltrace.Client(demo_address) as client:
        for item in PROMPTS[:2]:
            text = item["target"] + follows
            target = reltrace.Target(continuation=text)
            trace = client.trace(item["prompt"], target=target, sites="embed")
            other = client.trace("x", target=OTHER).target.token_id
            found = client.evaluate(
                [{**item, "target": text}],
                rules=["attnlrp"],
                points=5,
                measure=measure,
                replace=replace,
                keep=keep,
            )
            answer = trace.target.continuation_ids
            length = len(trace.tokens) - (len(answer) - 1)
            assert (len(answer) > 1) == bool(follows)

            def value(off: list[int]) -> float:
                with torch.no_grad():
                    ids = torch.tensor([trace.token_ids])  # noqa: B023 - called at once
                    if replace == OTHER:
                        ids[0, off] = other  # noqa: B023
                    embeddings = embed(ids)
                    if replace == "mean":
                        embeddings[0, off] = embed.weight.mean(0)
                    if replace == "zero":
                        embeddings[0, off] = 0
                    logits = model(inputs_embeds=embeddings).logits[0, length - 1 :]  # noqa: B023
                values = logits if measure == "logit" else logits.log_softmax(-1)
                total = float(values[range(len(answer)), list(answer)].sum())  # noqa: B023
                return math.exp(total) if measure == "probability" else total

            kept = (0,) if keep == "special" else ()
            expected = by_hand(
                trace["embed"][:length], shares_of(length - len(kept)), SHARES, value, kept
            )
            score = found.rules["attnlrp"]
            assert score.area.mean == pytest.approx(expected, abs=1e-3)
            assert score.most[0] == pytest.approx(value([]), abs=1e-3)
            assert score.areas.tolist() == [score.area.mean]
            assert (found.measure, found.keep) == (measure, keep)
            assert found.replace_id == (other if replace == OTHER else None)


def test_an_area_of_neurons_is_that_of_plain_forward_passes(demo_address: str) -> None:
    model = load_model(str(demo_path()), device="cpu").model
    item, off_now = PROMPTS[0], torch.zeros(0, dtype=torch.long)
    width = model.config.intermediate_size

    def switch_off(layer: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(_: object, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (neurons,) = inputs
            here = off_now[off_now // width == layer] % width
            # The first token keeps its own.
            return (torch.cat([neurons[:, :1], neurons[:, 1:].index_fill(-1, here, 0.0)], dim=1),)

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(switch_off(number))
    with reltrace.Client(demo_address) as client:
        trace = client.trace(
            item["prompt"], target=item["target"], sites="neuron", reduce="feature"
        )
        found = client.evaluate([item], site="neuron", rules=["attnlrp"], points=3, measure="logit")

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
            client.evaluate(
                PROMPTS[:5], site="neuron", rules=["attnlrp"], points=points, measure="logit"
            )
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
    assert found.best() == ("attnlrp",)
    assert found.warnings == ()
    hit, mass = scores["attnlrp"].hit, scores["attnlrp"].mass
    assert hit is not None
    assert mass is not None
    assert hit.mean > 0.9
    assert mass.mean > 0.5
    # Orders of chance belong to the prompt, not to its place in the file.
    assert again.rules["random"].area.mean == pytest.approx(scores["random"].area.mean, abs=1e-4)


def test_relevance_on_an_answer_leaves_out_the_white_space_before_it(demo_address: str) -> None:
    prompt = "My list:\ncats\nI love to play with my"
    with reltrace.Client(demo_address) as client:
        trace = client.trace(prompt, sites="embed")
        found = client.evaluate([{"prompt": prompt, "answer": "cats"}], rules=["attnlrp"])
    first = trace.tokens.index("\n") + 1
    last = next(i for i in range(first, len(trace.tokens)) if trace.tokens[i] == "\n")
    assert "".join(trace.tokens[first:last]) == "cats"
    positive = np.maximum(trace["embed"], 0)
    mass = found.rules["attnlrp"].mass
    assert mass is not None
    assert mass.mean == pytest.approx(positive[first:last].sum() / positive.sum(), rel=1e-3)
    assert positive[first - 1] > 0


def test_neurons_that_are_relevant_matter_more_than_others(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        found = client.evaluate(PROMPTS, site="neuron", rules=["attnlrp", "random"])
    relevant, chance = found.rules["attnlrp"].area, found.rules["random"].area
    assert relevant.mean - relevant.margin > chance.mean + chance.margin
    assert found.rules["attnlrp"].hit is None


def test_a_prompt_that_can_not_be_evaluated_costs_no_other(demo_address: str) -> None:
    bad = [
        {"prompt": "We have a dog", "answer": "zebra", "id": "absent"},
        {"prompt": "We have a dog", "target": 10**6, "id": "beyond"},
        {"input_ids": [5], "id": "kept"},
    ]
    with reltrace.Client(demo_address) as client:
        found = client.evaluate([*bad, *PROMPTS[:2]], rules=["gradient"])
    assert found.prompts == 2
    # In the order of the prompts, whichever fails first.
    assert list(found.failures) == ["absent", "beyond", "kept"]
    assert str(found.failures["kept"]) == "prompt: has no token to replace: of its 1, all are kept"


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"model": "nope"}, reltrace.ModelNotFound, "model: 'nope' is not served"),
        ({"rules": ["attnlrp", "lrp"]}, reltrace.InvalidArgument, "rules: 'lrp' is not one of"),
        ({"target": 10**6}, reltrace.InvalidArgument, "target: token id 1000000 is not in"),
        ({"replace": "no token"}, reltrace.InvalidArgument, "replace: 'no token' is not exactly"),
        ({"replace": 10**6}, reltrace.InvalidArgument, "replace: token id 1000000 is not in"),
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


def test_the_othernd_prints_a_table_and_draws_a_picture(
    demo_address: str, start: Callable[..., Process], tmp_path: Path
) -> None:
    source, picture = tmp_path / "prompts.jsonl", tmp_path / "curves.png"
    source.write_text('"We have a dog"\n' + "".join(json.dumps(p) + "\n" for p in PROMPTS[:4]))
    options = ("evaluate", str(source), "--server", demo_address, "--plot", str(picture))
    shown = start("reltrace", *options)
    output, _ = shown.popen.communicate(timeout=60)
    assert shown.popen.returncode == 0, shown.errors.read_text()
    assert "reltrace-demo: 5 prompts, tokens set to 0, by log-probability" in output
    for rule in ("attnlrp", "cp_lrp", "gradient", "random"):
        assert rule in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain = start("reltrace", *options[:4], "--json", "--rule", "gradient")
    (line,) = plain.popen.communicate(timeout=60)[0].splitlines()
    assert json.loads(line)["rules"]["gradient"]["area"]["count"] == 5
