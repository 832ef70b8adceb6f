"""A typer command whose options are the fields of one dataclass, and may stand in a TOML file.

An option is spelt once: its type, default, bounds and help. A value on the command line wins over
one of the environment, that over one of the file, and that over the default. Whoever imports this
module depends on typer itself.
"""

import dataclasses
import inspect
import tomllib
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

Options = TypeVar("Options")

_PREFIX = "RELTRACE_"


def option(text: str, *names: str, env: str | None = None, **settings: Any) -> Any:
    """Return the annotation that makes a field of a dataclass an option.

    Parameters
    ----------
    text : str
        The help.
    names : str
        Spelling on the command line; by default that of the field.
    env : str, optional
        Variable, without RELTRACE_; by default the field's name.
    settings : Any
        What `typer.Option` takes besides, ``min`` for example.
    """
    return typer.Option(*names, envvar=env, help=text, **settings)


def from_options(
    options: type[Options], *, config_env: str | None = None
) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Make a command out of a function that takes the context and a dataclass of options.

    Parameters
    ----------
    options : type
        A dataclass; fields without the annotation of `option` are no options.
    config_env : str, optional
        Variable that names a TOML file of options, as ``--config`` does; None: there is no such
        file.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", keyword, annotation=typer.Context)
    parameters = [context, *_parameters(options)]
    if config_env is not None:
        info = typer.Option(
            envvar=config_env,
            metavar="FILE.toml",
            is_eager=True,
            callback=_read_config,
            help="File of options, by their names here: result-ttl = 600.",
        )
        kind = Annotated[Path | None, info]
        parameters.append(inspect.Parameter("config", keyword, default=None, annotation=kind))

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


def _parameters(options: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(options, include_extras=True)
    made = []
    for field in dataclasses.fields(options):
        kind, *metadata = get_args(hints[field.name]) or (hints[field.name],)
        info = next((one for one in metadata if isinstance(one, OptionInfo)), None)
        if info is None:
            continue
        info = copy(info)
        info.envvar = f"{_PREFIX}{info.envvar or field.name.upper()}"
        default = field.default
        if get_origin(kind) is tuple:
            kind, default = list[get_args(kind)[0]], list(cast("tuple[Any, ...]", default))  # type: ignore[misc]
        required = default is dataclasses.MISSING
        made.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else default,
                annotation=Annotated[kind, info],
            )
        )
    return made


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{path}: {reason}") from None
    values = {name.replace("-", "_"): value for name, value in content.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(f"{path}: there is no option {unknown[0].replace('_', '-')!r}")
    context.default_map = values
    return path
