"""What holds for every option of every command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from reltrace.cli.app import app

WITHOUT = {"--help", "--version", "--install-completion", "--show-completion"}


def commands() -> Iterator[tuple[str, click.Command]]:
    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for child in getattr(command, "commands", {}).values():
            yield from walk(f"{name} {child.name}", child)

    return walk("reltrace", typer.main.get_command(app))


OPTIONS = [
    (name, option)
    for name, command in commands()
    for option in command.params
    if option.param_type_name == "option" and not WITHOUT & set(option.opts)
]


def test_options_are_not_read_from_environment_variables() -> None:
    """Only connection settings have variables, which `reltrace.cli.connection` reads."""
    assert [(name, option.opts) for name, option in OPTIONS if option.envvar is not None] == []


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_options_of_a_connection_are_those_of_every_command_that_connects(name: str) -> None:
    options = {option.opts[0] for of, option in OPTIONS if of == name}
    alone = {"reltrace atlas labels"}
    offline = name.startswith("reltrace atlas ") and name != "reltrace atlas build"
    assert ("--server" in options) is not (name in alone or offline)
    assert ("--server" in options) == ({"--profile", "--tls-ca", "--insecure"} <= options)


def test_every_option_is_explained() -> None:
    """A bracket would be taken for markup, and vanish."""
    helps = {(name, option.opts[0]): option.help or "" for name, option in OPTIONS}
    assert {key for key, text in helps.items() if not text or "[" in text} == set()


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *name.split(), "--help"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    words = {"bash": ("COMP_WORDS", "COMP_CWORD"), "zsh": ("_TYPER_COMPLETE_ARGS",)}.get(shell)
    setting = {"_RELTRACE_COMPLETE": f"complete_{shell}"}
    if words == ("COMP_WORDS", "COMP_CWORD"):
        setting |= {"COMP_WORDS": "reltrace st", "COMP_CWORD": "1"}
    else:
        setting |= {
            "_TYPER_COMPLETE_ARGS": "reltrace st",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
    program = "import sys; sys.argv = ['reltrace']; from reltrace.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | setting,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "status" in done.stdout
    assert "models" not in done.stdout


def test_a_closed_pipe_causes_no_traceback() -> None:
    reltrace = f"{sys.executable} -m reltrace batch --help | head -1"
    done = subprocess.run(reltrace, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
