"""What a notebook shows of texts that a model wrote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import reltrace


def written(text: str, *, stopped: bool = True) -> reltrace.Generation:
    return reltrace.Generation(
        text=text, tokens=[text], token_ids=[1], logprobs=np.zeros(1, np.float32),
        stopped=stopped, prompt_tokens=["I", " <b>"], prompt_token_ids=[2, 3],
        provenance=reltrace.Provenance("m&m", "r", "", "", "float32", "", False, "cpu"),
    )  # fmt: skip


def test_a_text_stands_behind_its_prompt() -> None:
    shown = written(" dogs <i>")._repr_html_()
    assert "I &lt;b&gt;</span><b> dogs &lt;i&gt;</b>" in shown
    assert "model m&amp;m" in shown
    assert "steered" not in shown


def test_steered_and_unsteered_text_are_side_by_side() -> None:
    found = replace(written(" dogs"), unsteered=written(" cats", stopped=False))
    shown = found._repr_html_()
    assert shown.index("as it is") < shown.index(" cats") < shown.index("steered")
    assert shown.index("steered") < shown.index(" dogs")
    # One of them would go on.
    assert shown.count("…") == 1
