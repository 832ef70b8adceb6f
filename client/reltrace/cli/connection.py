"""How a command reaches a server: options, environment variables and profiles of a file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import typer
from reltrace_proto.net import TlsOptions

import reltrace
from reltrace.cli.option_groups import option, option_group, with_option_groups
from reltrace.cli.output import AS_JSON, print_found
from reltrace.transport.settings import DEFAULT_ADDRESS, flag
from reltrace.types.errors import InvalidArgument, invalid

_PANEL = "Connection (each is also a variable: RELTRACE_SERVER, ...)"

_TOKENS = {"token", "token_file"}
_FILES = ("token_file", "tls_ca", "tls_cert", "tls_key", "config")
_SWITCHES = ("tls", "insecure")
# A token file before a token: of one source, the first counts.
_SETTINGS = (
    "server", "token_file", "token", "tls", "tls_ca", "tls_cert", "tls_key", "tls_name", "insecure",
)  # fmt: skip


def _setting(text: str, *names: str) -> Any:
    return option(None, text, *names, show_default=False, rich_help_panel=_PANEL)


@option_group
class Connection:
    """The options of a connection, before the name of a command or after it."""

    server: str | None = _setting(
        "HOST:PORT of the server, several with commas between, or dns:///NAME:PORT. "
        f"(default: {DEFAULT_ADDRESS})",
    )
    profile: str | None = _setting("Profile of the configuration file to take the settings from.")
    config: Path | None = _setting("Configuration file; `reltrace config` shows which one is used.")
    token_file: Path | None = _setting(
        "File with the token for the server, or put the token into RELTRACE_TOKEN."
    )
    tls: bool | None = _setting(
        "Use TLS; every other --tls option switches it on.", "--tls/--no-tls"
    )
    tls_ca: Path | None = _setting(
        "PEM file of the authorities to trust. (default: the public ones)"
    )
    tls_cert: Path | None = _setting("PEM file of this client's certificate.")
    tls_key: Path | None = _setting("PEM file of its key.")
    tls_name: str | None = _setting(
        "Name in the server's certificate. (default: the host of the address)"
    )
    insecure: bool | None = _setting(
        "Send the token in plaintext to another machine.", "--insecure"
    )

    def after(self, before: Connection | None) -> Connection:
        """Return these options with those that stand before the command."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(before or Connection(), **own)

    def client(self, retry_timeout: float = 30.0) -> reltrace.Client:
        """Return a client that waits `retry_timeout` seconds for a server that does not answer."""
        found = resolve(self)
        files = TlsOptions(*map(found.get, ("tls_ca", "tls_cert", "tls_key", "tls_name")))
        no_tls = found.values.get("tls") == Setting(False, "option")
        return reltrace.Client(
            found.get("server"),
            # "", not None: the client must not look it up in the environment again.
            token=found.get("token_file") or found.get("token") or "",
            tls=files if not no_tls and (found.get("tls") or files != TlsOptions()) else False,
            insecure=bool(found.get("insecure")),
            retry_timeout=retry_timeout,
        )


def connection_group(text: str) -> typer.Typer:
    """Return a command that has subcommands, and takes the options of a connection before them."""
    app = typer.Typer(no_args_is_help=True, help=text)
    app.callback()(with_option_groups(_options_before))
    return app


def _options_before(connection: Connection) -> None:
    pass


def config(connection: Connection, as_json: bool = AS_JSON) -> None:
    """Show the connection settings in effect and where each comes from."""
    found = resolve(connection)
    rows = [
        (name, "****" if name == "token" else str(value), source)
        for name, (value, source) in found.values.items()
    ]
    settings = {name: {"value": value, "source": source} for name, value, source in rows}
    if not as_json:
        missing = "" if found.file.exists() else " (does not exist)"
        typer.echo(f"configuration file: {found.file}{missing}")
        typer.echo(f"profile: {found.profile or 'none'}")
    summary = {"file": str(found.file), "profile": found.profile, "settings": settings}
    print_found(summary, as_json, ("setting", "value", "source"), rows)


class Setting(NamedTuple):
    """The value of a setting and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a connection that are in effect."""

    file: Path
    profile: str | None
    values: dict[str, Setting]

    def get(self, name: str) -> Any:
        return self.values[name].value if name in self.values else None


def resolve(options: Connection) -> Settings:
    """Return the settings in effect.

    Options win over environment variables, and these over the profile, unless an option names it.
    The default profile is not used for a server that an option or a variable names: it may hold
    the token of another one.
    """
    environment = _environment()
    path = options.config or environment.pop("config", None)
    file = path or Path(typer.get_app_dir("reltrace")) / "config.toml"
    default, profiles = _read(file, required=path is not None)
    if options.server is not None or "server" in environment:
        default = None
    name = options.profile or environment.pop("profile", None) or default
    layers = [("option", asdict(options)), ("environment", environment)]
    if name is not None:
        if name not in profiles:
            known = ", ".join(sorted(profiles)) or "none"
            raise invalid("profile", f"{name!r} is not in {file}; profiles there: {known}")
        layers.insert(1 if options.profile else 2, (f"profile {name}", profiles[name]))
    values: dict[str, Setting] = {}
    for source, layer in layers:
        for key in _SETTINGS:
            alternatives = _TOKENS if key in _TOKENS else {key}
            if layer.get(key) is not None and not alternatives & values.keys():
                values[key] = Setting(layer[key], source)
    values.setdefault("server", Setting(DEFAULT_ADDRESS, "default"))
    return Settings(file, name, values)


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*_SETTINGS, "profile", "config"):
        variable = f"RELTRACE_{name.upper()}"
        if text := os.environ.get(variable):
            found[name] = flag(variable) if name in _SWITCHES else text
            if name in _FILES:
                found[name] = Path(text)
    return found


def _read(file: Path, required: bool) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """Return the name of the default profile, and the settings of each profile."""
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError) and not required:
            return None, {}
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument(f"config: {file}: {reason}") from None
    _check(f"{file}: ", content, {"profile": str, "profiles": dict})
    profiles = content.get("profiles", {})
    _check(f"{file}: profiles.", profiles, dict.fromkeys(profiles, dict))
    kinds = {name: bool if name in _SWITCHES else str for name in _SETTINGS if name != "token"}
    for name, profile in profiles.items():
        _check(f"{file}: profiles.{name}.", profile, kinds)
        for key in set(_FILES) & set(profile):
            profile[key] = file.parent / Path(profile[key]).expanduser()
    return content.get("profile"), profiles


_KINDS = {str: "a text", bool: "true or false", dict: "a table"}


def _check(where: str, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, value in found.items():
        if key not in kinds:
            raise invalid(f"{where}{key}", f"is not known; allowed: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise invalid(f"{where}{key}", f"must be {_KINDS[kinds[key]]}, not {value!r}")
