"""What is public: the same names and arguments on both clients, each with its documentation."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import pytest
import reltrace
from reltrace.client import generate
from reltrace.types.request import TraceManyOptions, TraceOptions

HEAVY = [
    "torch", "transformers", "pandas", "pyarrow", "matplotlib", "tqdm", "rich", "safetensors",
    "typer", "datasets", "IPython", "redis",
]  # fmt: skip


def public(client: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(client) if not name.startswith("_")}


def test_both_clients_have_the_same_names() -> None:
    assert public(reltrace.Client).keys() == public(reltrace.AsyncClient).keys()


@pytest.mark.parametrize("name", ["__init__", *public(reltrace.Client)])
def test_a_method_takes_the_same_arguments_on_both_clients(name: str) -> None:
    sync, asynchronous = getattr(reltrace.Client, name), getattr(reltrace.AsyncClient, name)
    if isinstance(sync, property):
        assert isinstance(asynchronous, property)
        return
    one, other = inspect.signature(sync), inspect.signature(asynchronous)
    assert list(one.parameters) == list(other.parameters)
    for parameter in one.parameters.values():
        twin = other.parameters[parameter.name]
        assert (parameter.kind, parameter.default) == (twin.kind, twin.default)
        assert parameter.annotation == twin.annotation


@pytest.mark.parametrize("name", ["trace", "trace_many", "evaluate"])
def test_every_argument_is_documented(name: str) -> None:
    method = getattr(reltrace.Client, name)
    documentation = inspect.getdoc(method) or ""
    section = documentation.partition("Parameters\n")[2].partition("\nRaises\n")[0]
    said = {word.strip() for line in section.splitlines() if not line.startswith(" ")
            for word in line.partition(":")[0].split(",")}  # fmt: skip
    if name == "trace_many":
        assert "As in `trace`" in section
    assert set(inspect.signature(method).parameters) - {"self"} <= said


@pytest.mark.parametrize("name", [name for name in reltrace.__all__ if not name.startswith("_")])
def test_every_public_name_says_what_it_is(name: str) -> None:
    value = getattr(reltrace, name)
    documentation = inspect.getdoc(value) or ""
    assert documentation
    if dataclasses.is_dataclass(value):
        assert value.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
        for field in dataclasses.fields(value):
            assert field.name.startswith("_") or field.name in documentation, field.name


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("trace", TraceOptions, {"prompt", "target"}),
        ("trace_many", TraceManyOptions, {"items", "target"}),
    ],
)
def test_the_overloads_take_every_argument(name: str, options: type, others: set[str]) -> None:
    signature = inspect.signature(getattr(reltrace.AsyncClient, name))
    assert signature.parameters.keys() - {"self"} == options.__annotations__.keys() | others


def test_the_synchronous_client_is_generated_from_the_asynchronous_one() -> None:
    assert generate.TARGET.read_text() == generate.generated()


def test_the_synchronous_client_is_not_described_as_the_asynchronous_one() -> None:
    described = reltrace.Client.__doc__ or ""
    assert "await" not in described
    assert "event loop" not in described


def test_importing_works_where_there_is_no_fcntl() -> None:
    """As on Windows."""
    absent = ["fcntl", "termios", "resource", "pwd", "grp"]
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nimport reltrace"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_importing_is_light() -> None:
    code = f"import sys, reltrace\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
