"""`reltrace config`: the settings of a connection, and where they come from."""

from __future__ import annotations

import typer
from rich.console import Console

from reltrace.cli.connection import Connection, resolve
from reltrace.cli.output import AsJson, print_json, table

_SECRET = ("token",)


def config(connection: Connection, as_json: AsJson = False) -> None:
    """Show the connection settings in effect and where each comes from."""
    found = resolve(connection)
    rows = [
        (name, "****" if name in _SECRET else str(value), source)
        for name, (value, source) in found.values.items()
    ]
    if as_json:
        settings = {name: {"value": value, "source": source} for name, value, source in rows}
        print_json({"file": str(found.file), "profile": found.profile, "settings": settings})
        return
    missing = "" if found.file.exists() else " (there is none)"
    typer.echo(f"configuration file: {found.file}{missing}")
    typer.echo(f"profile: {found.profile or 'none'}")
    Console().print(table(("setting", "value", "source"), rows))
