"""What an evaluation shows of itself, and what of it is no number."""

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from reltrace.evaluation.scores import Mean
from reltrace.types.errors import invalid
from reltrace.viz.curves import ticks


def made(
    prompts: int = 3, site: str = "embed", located: bool = True, **told: Any
) -> reltrace.Evaluation:
    at = np.array([0.0, 0.5, 1.0]) if site == "embed" else np.array([0.0, 20.0, 384.0])

    def score(area: float) -> reltrace.RuleScore:
        return reltrace.RuleScore(
            area=Mean.of([area] * prompts),
            areas=np.full(prompts, area),
            most=at[: 3 if prompts else 0] + 1,
            least=at[: 3 if prompts else 0] + 2,
            hit=Mean.of([1.0] * prompts) if located and prompts else None,
            mass=Mean.of([0.5] * prompts) if located and prompts else None,
        )

    settings = {"measure": "logprob", "replace": "zero", "replace_id": None, "keep": "special"}
    settings |= {"warnings": ()} | told
    return reltrace.Evaluation(
        model="a <b>" if prompts else "",
        site=site,
        prompts=prompts,
        at=at if prompts else at[:0],
        rules={"gradient": score(1.0), "attnlrp": score(2.0)},
        failures={"x": invalid("answer", "is <not> there")},
        **settings,
    )


def compared(**areas: list[float]) -> reltrace.Evaluation:
    """An evaluation of rules with these areas, prompt by prompt."""
    plain = made(len(next(iter(areas.values()))))
    score = plain.rules["attnlrp"]
    rules = {
        rule: replace(score, area=Mean.of(values), areas=np.array(values))
        for rule, values in areas.items()
    }
    return replace(plain, rules=rules)


def test_it_is_one_line_where_it_is_printed() -> None:
    found = made(1234)
    assert repr(found) == (
        "Evaluation(a <b>: 1,234 prompts, tokens set to 0, by log-probability, 1 failed; "
        "area gradient 1.000 ± 0.000, attnlrp 2.000 ± 0.000)"
    )
    assert repr(found.rules["attnlrp"]) == (
        "RuleScore(area 2.000 ± 0.000, hit 1.000 ± 0.000, mass 0.500 ± 0.000, curves of 3 points)"
    )
    assert "hit" not in repr(made(located=False).rules["attnlrp"])
    assert repr(made(0)) == "Evaluation(0 prompts, tokens set to 0, by log-probability, 1 failed)"
    assert repr(made(warnings=("it rises",))).endswith("± 0.000; warning: it rises)")


@pytest.mark.parametrize(
    ("told", "title"),
    [
        ({"replace": "mean"}, "tokens set to the mean embedding, by log-probability"),
        (
            {"replace": " the", "replace_id": 5, "measure": "probability"},
            "tokens replaced by ' the', by probability",
        ),
        ({"site": "neuron", "measure": "logit"}, "neurons set to 0, by logit"),
    ],
)
def test_a_title_says_what_was_done(told: dict[str, Any], title: str) -> None:
    assert made(**told).title == f"a <b>: 3 prompts, {title}"


def test_a_rule_is_best_where_its_area_is_larger_prompt_by_prompt() -> None:
    """
    Given rules whose marginal intervals overlap, of prompts that differ more than rules do
    I expect the differences at the same prompts to tell them apart.
    """
    prompts = [1.0, 5.0, 9.0, 13.0]
    found = compared(a=prompts, b=[x + 1 + 0.01 * x for x in prompts], c=[0.0] * 4)
    assert found.rules["b"].area.mean - found.rules["b"].area.margin < found.rules["a"].area.mean
    assert found.best() == ("b",)
    assert "best: b, whose area is larger" in found._repr_html_()
    assert found.to_dict()["best"] == ["b"]


def test_no_rule_is_best_where_they_can_not_be_told_apart() -> None:
    found = compared(a=[1.0, 5.0, 9.0], b=[4.0, 3.0, 9.0], c=[-5.0, -4.0, -6.0], d=[1.0, 5.0, 9.0])
    assert found.best() == ("a", "b", "d")
    shown = found._repr_html_()
    assert "no rule is best: a, b, d can not be told apart on these prompts" in shown
    assert "font-weight:700" not in shown
    # Of one prompt, nothing can be told.
    assert compared(a=[1.0], b=[9.0]).best() == ("a", "b")


def test_a_warning_is_seen(tmp_path: Path) -> None:
    said = "the logit <rises> as $x$ tokens go"
    found = made(measure="logit", warnings=(said,))
    assert "Warning: the logit &lt;rises&gt;" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["warnings"] == [said]
    found.plot(tmp_path / "x.svg")
    assert f"<!-- Warning: {escape(said, quote=False)} -->" in (tmp_path / "x.svg").read_text()


def test_a_figure_can_be_traced() -> None:
    told = made(replace=" the", replace_id=5, keep="none", measure="probability").to_dict()
    assert {key: told[key] for key in ("measure", "replace", "replace_id", "keep")} == {
        "measure": "probability", "replace": " the", "replace_id": 5, "keep": "none",
    }  # fmt: skip


def test_a_notebook_shows_a_table() -> None:
    shown = made()._repr_html_()
    assert "a &lt;b&gt;: 3 prompts, tokens set to 0, by log-probability" in shown
    assert shown.count("<tr") == 3
    assert shown.count("font-weight:700") == 4  # the cells of the best rule
    assert "is &lt;not&gt; there" in shown
    assert "answer is strongest" in shown
    assert "answer is strongest" not in made(located=False)._repr_html_()
    assert shown.count("best: attnlrp") == 1
    assert "<table" not in made(0)._repr_html_()


def test_one_prompt_has_no_interval() -> None:
    found = made(1)
    assert "±" not in repr(found)
    assert "no interval" in found._repr_html_()
    score = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rules"]["attnlrp"]
    assert score["area"] == {"mean": 2.0, "margin": None, "count": 1}
    assert score["mass"] == {"mean": 0.5, "margin": None, "count": 1}


def test_of_no_prompt_there_is_no_best_rule_and_no_picture(tmp_path: Path) -> None:
    found = made(0)
    said = "prompts: none of 1 could be evaluated: x: answer: is <not> there"
    with pytest.raises(reltrace.InvalidArgument, match=said):
        found.best()
    with pytest.raises(reltrace.InvalidArgument, match=said):
        found.plot(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    area = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rules"]["attnlrp"]["area"]
    assert area == {"mean": None, "margin": None, "count": 0}
    assert made(2).best() == ("attnlrp",)


@pytest.mark.parametrize("site", ["embed", "neuron"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_picture_says_what_was_switched_off(site: str, prompts: int, tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    made(prompts, site).plot(str(path))
    # Text is drawn as shapes, each with its text as a comment.
    drawn = path.read_text()
    assert "<!-- log-probability (mean over prompts) -->" in drawn
    assert ("<!-- 384 -->" in drawn) == (site == "neuron")
    assert ("<!-- area between the curves (95 % interval) -->" in drawn) == (prompts > 1)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("x.html", "plot: must end in .png, .svg or .pdf, not 'x.html'"),
        ("x", "plot: must end in .png, .svg or .pdf, not 'x'"),
        ("none/x.png", "plot: there is no folder 'none'"),
    ],
)
def test_a_picture_that_can_not_be_written(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(reltrace.InvalidArgument) as caught:
        made().plot(path)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("last", "shown"),
    [(1, [0, 1]), (12, [0, 1, 12]), (384, [0, 1, 10, 100, 384]), (1024, [0, 1, 10, 100, 1024])],
)
def test_numbers_on_the_axis_of_neurons_do_not_meet(last: int, shown: list[int]) -> None:
    assert ticks(last) == shown
