"""Dataclasses of options that several commands share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import typer

Function = TypeVar("Function", bound=Callable[..., None])


def option(text: str, *names: str, **settings: Any) -> Any:
    """Return what annotates an option: its help, its names if they are not the parameter's."""
    return typer.Option(*names, help=text, **settings)


def command(app: typer.Typer, *names: str, **settings: Any) -> Callable[[Function], Function]:
    """Add a function to an app, as `typer.Typer.command` does. See `with_option_groups`."""

    def add(function: Function) -> Function:
        app.command(*names, **settings)(with_option_groups(function))
        return function

    return add


def with_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer; its parameters that are dataclasses become an option per field.

    A class whose options may also stand before the command has a method `after`, which takes the
    instance of these (or None) and returns what holds for the command.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    options: dict[str, tuple[Any, Any]] = {"context": (typer.Context, inspect.Parameter.empty)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            annotations = get_type_hints(groups[name], include_extras=True)
            for field in dataclasses.fields(groups[name]):
                options[field.name] = (annotations[field.name], field.default)
        else:
            options[name] = (hints[name], parameter.default)

    def command(context: typer.Context, **values: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            made = group(**{field: values.pop(field) for field in fields})
            if hasattr(made, "after"):
                made = context.obj = made.after(context.find_object(group))
            values[name] = made
        if "context" in hints:
            values["context"] = context
        function(**values)

    kind = inspect.Parameter.KEYWORD_ONLY
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # typer reads the signature first, and then annotations that contradict it.
    command.__annotations__ = {}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )
    return command
