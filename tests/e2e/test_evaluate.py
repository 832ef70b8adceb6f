"""Which rule to trust, on the demo model, through the whole service."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

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


def by_hand(item: dict[str, str], relevance: np.ndarray, trace: reltrace.Trace) -> float:
    """Compute the area of one prompt with the model as transformers runs it."""
    loaded = load_model(str(demo_path()), device="cpu")
    ids = torch.tensor([trace.token_ids])

    def logit(off: list[int]) -> float:
        with torch.no_grad():
            embeddings = loaded.model.get_input_embeddings()(ids)
            embeddings[0, off] = 0
            logits = loaded.model(inputs_embeds=embeddings).logits[0, -1]
        return float(logits[trace.target.token_id])

    order = sorted(range(len(relevance)), key=lambda i: (-relevance[i], i))
    curves = []
    for turned in (order, order[::-1]):
        counts = [int(np.floor(share * len(order) + 0.5)) for share in np.linspace(0, 1, 6)]
        curves.append([logit(turned[:count]) for count in counts])
    most, least = curves
    heights = [b - a for a, b in zip(most, least, strict=True)]
    return sum((a + b) / 2 / 5 for a, b in pairwise(heights))


def test_an_area_is_that_of_plain_forward_passes(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        for item in PROMPTS[:3]:
            trace = client.trace(item["prompt"], target=item["target"], sites="embed")
            found = client.evaluate([item], rules=["attnlrp"], points=5)
            expected = by_hand(item, trace["embed"], trace)
            assert found.rules["attnlrp"].area.mean == pytest.approx(expected, abs=1e-3)
            assert found.rules["attnlrp"].most[0] == pytest.approx(trace.target.logit, abs=1e-4)


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
    assert set(found.failures) == {"absent", "split"}


def test_the_command_prints_a_table_and_draws_a_picture(
    demo_address: str, start: Callable[..., Process], tmp_path: Path
) -> None:
    source, picture = tmp_path / "prompts.jsonl", tmp_path / "curves.png"
    source.write_text("We have a dog\n" + "".join(json.dumps(p) + "\n" for p in PROMPTS[:4]))
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
