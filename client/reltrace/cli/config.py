"""`reltrace config`: the settings of a connection, and where they come from."""

from __future__ import annotations

import typer

from reltrace.cli.connection import Connection, resolve
from reltrace.cli.output import AS_JSON, print_found

_SECRET = ("token",)


def config(connection: Connection, as_json: bool = AS_JSON) -> None:
    """Show the connection settings in effect and where each comes from."""
    found = resolve(connection)
    rows = [
        (name, "****" if name in _SECRET else str(value), source)
        for name, (value, source) in found.values.items()
    ]
    settings = {name: {"value": value, "source": source} for name, value, source in rows}
    if not as_json:
        missing = "" if found.file.exists() else " (there is none)"
        typer.echo(f"configuration file: {found.file}{missing}")
        typer.echo(f"profile: {found.profile or 'none'}")
    summary = {"file": str(found.file), "profile": found.profile, "settings": settings}
    print_found(summary, as_json, ("setting", "value", "source"), rows)
