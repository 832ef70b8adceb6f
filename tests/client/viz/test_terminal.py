"""A trace in the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace
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


def test_names_of_sites_and_roles_are_neither_markup_nor_control_characters() -> None:
    """
    Given a trace of a stranger's file, whose sites and roles have any name
    I expect them to be shown as they are, with control characters escaped.
    """
    trace = make_trace({"x[/bold]\x1b[2J": (2, 5)})
    trace["x[/bold]\x1b[2J"][:] = [9, 0, 0, 0, 0]
    turn = reltrace.Turn("r[/bold]\x1b[2J", 1, 3)
    trace = replace(trace, turns=(turn,))
    for options in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        text = shown(trace, **options)
        assert "x[/bold]\\x1b[2J" in text
        assert "r[/bold]\\x1b[2J" in text
        assert "\x1b[2J" not in text
    file = io.StringIO()
    terminal.show_strongest(trace, Console(file=file), trace.sites[0])
    assert "site x[/bold]\\x1b[2J" in file.getvalue()


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True}])
def test_without_colours_there_are_numbers(options: dict[str, Any]) -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [-4, 0, 2, 4, 1]
    text = shown(trace, **options)
    assert "48;2" not in text
    assert re.search(r"2 +' cats' +\+2", text)
