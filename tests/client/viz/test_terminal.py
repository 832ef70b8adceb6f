"""A trace in the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import reltrace
from make_trace import make_trace
from reltrace.viz import terminal
from rich.console import Console


def shown(trace: reltrace.Trace, **options: Any) -> str:
    file = io.StringIO()
    terminal.show(trace, Console(file=file, width=100, **options))
    return file.getvalue()


def test_the_terminal_colours_tokens() -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [-4, 0, 2, 4, 1]
    text = shown(trace, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;255;255;255;48;2;33;102;172m<s>" in text
    assert "\x1b[38;2;0;0;0;48;2;255;255;255m My" in text
    assert "\x1b[38;2;255;255;255;48;2;178;24;43m</script>" in text
    assert "-4 " in text
    assert "red: for the target, blue: against" in text


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True}])
def test_without_colours_there_are_numbers(options: dict[str, Any]) -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [-4, 0, 2, 4, 1]
    text = shown(trace, **options)
    assert "48;2" not in text
    assert re.search(r"2 +' cats' +\+2", text)
