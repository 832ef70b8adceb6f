"""A command whose options are the fields of a dataclass."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest
import typer
from damage import damaged_toml, damages
from hypothesis import given
from reltrace_proto.options import from_options, option
from typer.testing import CliRunner


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Options:
    """Some of each kind."""

    name: str = option(..., "A name.")
    max_jobs: int = option(3, "A number.", min=1)
    colour: Colour = option(Colour.RED, "One of several.")
    uri: tuple[str, ...] = option((), "Several times.", env="OUTPUT_URI")
    insecure: bool = option(False, "A flag.", env="LISTEN_INSECURE")
    fixed: float = 0.5


@pytest.fixture
def seen() -> list[Options]:
    return []


@pytest.fixture
def app(seen: list[Options]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @from_options(Options, config_env="TEST_CONFIG")
    def command(context: typer.Context, options: Options) -> None:
        """Do something."""
        seen.append(options)

    return app


def test_defaults_and_the_command_line(app: typer.Typer, seen: list[Options]) -> None:
    arguments = ["--name", "a", "--colour", "blue", "--uri", "x", "--uri", "y", "--insecure"]
    assert CliRunner().invoke(app, ["--name", "a"]).exit_code == 0
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [
        Options(name="a"),
        Options(name="a", colour=Colour.BLUE, uri=("x", "y"), insecure=True),
    ]


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    app: typer.Typer, seen: list[Options], tmp_path: Path
) -> None:
    file = tmp_path / "options.toml"
    file.write_text(
        'name = "file"\nmax-jobs = 7\ncolour = "blue"\nuri = ["x", "y"]\ninsecure = true\n'
    )
    environment = {"TEST_CONFIG": str(file), "RELTRACE_MAX_JOBS": "8", "RELTRACE_OUTPUT_URI": "u v"}
    assert CliRunner().invoke(app, ["--name", "line"], env=environment).exit_code == 0
    assert seen == [Options("line", 8, Colour.BLUE, ("u", "v"), insecure=True)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max-jobs = 0", "greater than or equal to 1"),
        ('colour = "green"', "green"),
        ("fixed = 1", "there is no option 'fixed'"),
        ("config = 'x'", "there is no option 'config'"),
        ("max-jobs =", "Invalid value"),
        (None, "No such file"),
    ],
)
def test_a_file_that_can_not_be_used(
    app: typer.Typer, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "options.toml"
    if content is not None:
        file.write_text(content)
    done = CliRunner().invoke(app, ["--name", "a", "--config", str(file)])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())


def test_what_must_be_given(app: typer.Typer, seen: list[Options]) -> None:
    assert CliRunner().invoke(app, []).exit_code == 2
    assert seen == []


@damages
@given(content=damaged_toml('name = "a"\nmax-jobs = 4\nuri = ["x", "y"]\ninsecure = true\n'))
def test_a_damaged_file_is_options_or_a_usage_error(tmp_path: Path, content: bytes) -> None:
    seen: list[Options] = []
    app = typer.Typer()

    @app.command()
    @from_options(Options, config_env="TEST_CONFIG")
    def command(context: typer.Context, options: Options) -> None:
        """Do something."""
        seen.append(options)

    file = tmp_path / "damaged.toml"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["--config", str(file)])
    assert result.exit_code == (0 if seen else 2), result.exception
