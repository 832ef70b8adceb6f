"""A typer command whose options are the fields of one dataclass, and may stand in a TOML file.

An option is spelt once: its name, type, default, bounds and help. A value on the command line wins
over one of the environment, that over one of the file, and that over the default. Whoever imports
this module depends on typer itself.
"""

import dataclasses
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import typer

Options = TypeVar("Options")

_PREFIX = "RELTRACE_"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def option(default: Any, text: str, *, env: str | None = None, **settings: Any) -> Any:
    """Return a field of a dataclass that is an option, with the field's name.

    Parameters
    ----------
    default : Any
        ``...``: it must be given.
    text : str
        The help.
    env : str, optional
        Variable, without RELTRACE_; by default the field's name.
    settings : Any
        What `typer.Option` takes besides, ``min`` for example.
    """
    metadata = {"option": {"help": text, "envvar": env, **settings}}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_options(
    options: type[Options], *, config_env: str | None = None
) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Make a command out of a function that takes the context and a dataclass of options.

    Parameters
    ----------
    options : type
        A dataclass; fields that are not made by `option` are no options.
    config_env : str, optional
        Variable that names a TOML file of options, as ``--config`` does; None: there is no such
        file.
    """
    hints = get_type_hints(options)
    fields = [field for field in dataclasses.fields(cast("Any", options)) if field.metadata]
    parameters = [inspect.Parameter("context", _KEYWORD, annotation=typer.Context)]
    parameters += [_parameter(field, hints[field.name]) for field in fields]
    if config_env is not None:
        info = typer.Option(
            envvar=config_env,
            metavar="FILE.toml",
            is_eager=True,
            callback=_read_config,
            help='File of options, by their names here: log-level = "debug".',
        )
        kind = Annotated[Path | None, info]
        parameters.append(inspect.Parameter("config", _KEYWORD, default=None, annotation=kind))

    def decorate(function: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        def command(context: typer.Context, config: Path | None = None, **values: Any) -> None:
            given = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
            function(context, options(**given))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        cast("Any", command).__signature__ = inspect.Signature(parameters)
        return command

    return decorate


def is_on_command_line(context: typer.Context, name: str) -> bool:
    """Tell whether an option was given where every user of the machine can read it."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    settings = dict(field.metadata["option"])
    settings["envvar"] = f"{_PREFIX}{settings['envvar'] or field.name.upper()}"
    # A flag has no --no-NAME: it is off unless it is given.
    names = [f"--{field.name.replace('_', '-')}"] if kind is bool else []
    default: Any = field.default
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    elif default is False or default in (None, "", ()):
        settings.setdefault("show_default", False)
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = list(default) if isinstance(default, tuple) else default
    annotation = Annotated[kind, typer.Option(*names, **settings)]
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{path}: {reason}") from None
    values = {name.replace("-", "_"): value for name, value in content.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(f"{path}: there is no option {unknown[0].replace('_', '-')!r}")
    context.default_map = values
    return path
