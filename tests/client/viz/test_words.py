"""Tokens as people read them: characters over several tokens, white space, turns."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reltrace
from make_trace import make_trace
from reltrace.viz import terminal
from reltrace.viz.words import Segment, Words, segments
from rich.console import Console

TEXT = "<s>I like my café 😀 you好"
TOKENS = ["<s>", "I", "Ġlike", "Ġmy", "ĠcafÃ", "©", "ĠðŁ", "ĺ", "Ģ", "Ġyou", "å¥", "½"]
SPANS = [
    (0, 3), (3, 4), (4, 9), (9, 12), (12, 17), (12, 17), (17, 19), (17, 19), (17, 19), (19, 23),
    (23, 24), (23, 24),
]  # fmt: skip
SHOWN = ["<s>", "I", " like", " my", " café", "₂", " 😀", "₂", "₃", " you", "好", "₂"]
NAMES = [
    "<s>", "I", " like", " my", " café", " café₂", " 😀", " 😀₂", " 😀₃", " you", "好", "好₂",
]  # fmt: skip


@pytest.fixture
def trace() -> reltrace.Trace:
    return replace(
        make_trace({"resid": (3, len(TOKENS))}, tokens=TOKENS),
        text=TEXT, offsets=np.array(SPANS), special_positions=(0,),
    )  # fmt: skip


@pytest.mark.parametrize("with_offsets", [True, False])
def test_characters_over_several_tokens_are_whole(
    trace: reltrace.Trace, with_offsets: bool
) -> None:
    """The bytes of older traces' tokens tell the same as offsets."""
    if not with_offsets:
        trace = replace(trace, text="", offsets=np.zeros((0, 2), int), special_positions=())
    words = Words.of(trace)
    assert (words.texts, words.names) == (SHOWN, NAMES)
    assert words.special == [True] + [False] * (len(TOKENS) - 1)


def test_no_picture_shows_bytes(trace: reltrace.Trace, tmp_path: Path) -> None:
    target = replace(
        trace.target, token="ĠðŁ", candidates=(reltrace.Candidate("ĠcafÃ", 3, 1.5, 0.25),)
    )
    trace = replace(trace, target=target)
    file = io.StringIO()
    console = Console(file=file, width=100)
    terminal.show(trace, console)
    terminal.show(trace, Console(file=file, force_terminal=True, color_system="truecolor"))
    terminal.show_strongest(trace, console, "resid", count=50)
    page = trace.plot(tmp_path / "trace.html").read_text()
    for text in (file.getvalue(), page, trace._repr_html_()):
        assert " café" in text
        assert "😀₂" in text or " 😀" in text
        assert not set("ÃðŁĺ©½\ufffd") & set(text)
    assert r"Relevance of ' \xf0\x9f' (logit" in file.getvalue()
    assert r"Likeliest next: ' caf\xc3' 25.0%" in file.getvalue()


def test_offsets_win_over_what_tokens_look_like() -> None:
    """
    Given letters of a SentencePiece vocabulary that look like the bytes of another letter
    I expect them as they are; and white space that no token has before the next one.
    """
    trace = make_trace({"resid": (1, 3)}, tokens=["Ã", "©", "dog"])
    known = replace(trace, text="Ã©  dog", offsets=np.array([(0, 1), (1, 2), (4, 7)]))
    assert Words.of(known).texts == ["Ã", "©", "  dog"]


def test_turns_and_what_is_between_them(trace: reltrace.Trace) -> None:
    assert segments(trace) == [Segment(0, 12, "")]
    turns = (reltrace.Turn("user", 1, 3), reltrace.Turn("x", 3, 3), reltrace.Turn("bot", 4, 12))
    trace = replace(trace, turns=turns)
    assert segments(trace) == [
        Segment(0, 1, ""), Segment(1, 3, "user"), Segment(3, 4, ""), Segment(4, 12, "bot"),
    ]  # fmt: skip
    file = io.StringIO()
    terminal.show(trace, Console(file=file, width=100))
    assert [line.split()[1] for line in file.getvalue().splitlines() if " user " in line] == [
        "user", "user",
    ]  # fmt: skip
    file = io.StringIO()
    coloured = Console(file=file, force_terminal=True, color_system="truecolor", width=100)
    terminal.show(replace(trace, hints=()), coloured)
    assert "bot: " in file.getvalue()
    shown = replace(trace, hints=("ends <in> a space",))._repr_html_()
    assert ">user</b>" in shown
    assert "ends &lt;in&gt; a space" in shown


def test_much_relevance_on_the_first_token_is_reported(trace: reltrace.Trace) -> None:
    for first, told in ((1.0, False), (100.0, True)):
        trace.relevance[:] = 1
        trace.relevance[:, 0] = first
        file = io.StringIO()
        terminal.show(trace, Console(file=file, width=200))
        assert ("The first token has 90% of |R| at site resid" in file.getvalue()) is told
