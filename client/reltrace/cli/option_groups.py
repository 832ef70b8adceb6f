"""Options of commands as parameters and, where commands share them, as fields of dataclasses.

Both are written ``name: type = option(default, help)``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform, get_type_hints

import typer

Function = TypeVar("Function", bound=Callable[..., None])
Class = TypeVar("Class", bound=type)


def option(default: Any, text: str, *names: str, **settings: Any) -> Any:
    """Return an option; `names` if it is spelt otherwise than the parameter."""
    return typer.Option(default, *names, help=text, **settings)


def argument(default: Any, text: str, **settings: Any) -> Any:
    """Return a positional argument; default ``...``: it must be given."""
    return typer.Argument(default, help=text, **settings)


@dataclass_transform(frozen_default=True)
def option_group(group: Class) -> Class:
    """Make a frozen dataclass of a class whose attributes are options."""
    for name in group.__annotations__:
        info = vars(group)[name]
        field = dataclasses.field(default=info.default, metadata={"option": info})
        setattr(group, name, field)
    return cast("Class", dataclasses.dataclass(frozen=True)(group))


def command(app: typer.Typer, *names: str, **settings: Any) -> Callable[[Function], Function]:
    """Add a function to an app, as `typer.Typer.command` does. See `with_option_groups`."""

    def add(function: Function) -> Function:
        app.command(*names, **settings)(with_option_groups(function))
        return function

    return add


def with_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer; a parameter that is an option group becomes its options.

    A group whose options may also stand before the command has a method `after`, which takes the
    instance of these (or None) and returns what holds for the command.
    """
    hints = get_type_hints(function)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = {"context": inspect.Parameter("context", kind, annotation=typer.Context)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters[name] = parameter.replace(kind=kind, annotation=hints[name])
            continue
        group_hints = get_type_hints(groups[name])
        for field in dataclasses.fields(groups[name]):
            parameters[field.name] = inspect.Parameter(
                field.name,
                kind,
                default=field.metadata["option"],
                annotation=group_hints[field.name],
            )

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

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # typer would prefer these annotations to those of the signature.
    command.__annotations__ = {}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        list(parameters.values())
    )
    return command
