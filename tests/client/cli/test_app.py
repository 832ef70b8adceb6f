"""The `reltrace` command as a whole."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import reltrace
import typer
from cli.conftest import Run
from fake_server import FakeServer
from reltrace.cli import app
from typer.testing import CliRunner

PROMPT = "My cats love to play with my"


def test_only_a_connection_comes_from_the_environment(
    command: Run, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given variables that are named like options of a batch
    I expect them to have no effect: one that is forgotten would leave prompts out.
    """
    for name, value in (("LIMIT", "1"), ("TARGET", "cats"), ("LAYER", "1"), ("RULE", "gradient")):
        monkeypatch.setenv(f"RELTRACE_{name}", value)
    source = tmp_path / "in.txt"
    source.write_text("one\ntwo\n")
    assert command("batch", str(source), str(tmp_path / "out"))[0] == 0
    specs = [spec for request in server.requests for spec in request.jobs]
    assert [spec.prompt for spec in specs] == ["one", "two"]
    assert (specs[0].rule, list(specs[0].layers), specs[0].targets[0].token.text) == (
        "attnlrp", [], "",
    )  # fmt: skip


def test_run_is_the_old_name_of_trace(command: Run, server: FakeServer) -> None:
    assert command("run", PROMPT)[0] == 0
    assert server.requests[0].jobs[0].prompt == PROMPT
    assert " run " not in command("--help")[1]


def test_usage_errors_exit_with_2(command: Run) -> None:
    assert command("trace")[0] == 2
    assert command("trace", PROMPT, "--timeout", "soon")[0] == 2
    assert command("fly")[0] == 2


def test_version(command: Run) -> None:
    assert command("--version") == (0, f"reltrace {reltrace.__version__}\n", "")


def test_commands_of_other_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Given a distribution that declares the command `up`
    I expect it among the commands, and without one a sentence that says what to install.
    """

    def up(port: int = 1) -> None:
        print("on port", port)

    def load(entry: EntryPoint) -> Any:
        return up

    monkeypatch.setattr(EntryPoint, "load", load)
    for installed in (True, False):
        entries = EntryPoints([EntryPoint("up", "somewhere:up", "reltrace.commands")] * installed)
        monkeypatch.setattr(app, "entry_points", lambda group, found=entries: found)
        made = typer.Typer()
        made.callback()(lambda: None)
        app.add_installed_commands(made)
        done = CliRunner().invoke(made, ["up", "--port", "7"])
        if installed:
            assert done.output == "on port 7\n"
        else:
            assert isinstance(done.exception, reltrace.MissingDependency)
            assert "pip install reltrace-scheduler" in str(done.exception)
