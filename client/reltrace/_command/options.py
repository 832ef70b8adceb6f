"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import reltrace
from reltrace._transport.address import ADDRESS_VARIABLE, DEFAULT_ADDRESS
from reltrace._transport.security import TlsOptions

Server = Annotated[
    str | None,
    typer.Option(
        envvar=ADDRESS_VARIABLE,
        help="HOST:PORT of the server, several with commas between, or dns:///NAME:PORT."
        f"  [default: {DEFAULT_ADDRESS}]",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="RELTRACE_JSON", help="Print JSON for machines.")
]


@dataclass(frozen=True, slots=True)
class Access:
    """What the options before the command say."""

    token_file: Path | None
    tls: TlsOptions | bool | None
    insecure: bool | None

    def client(self, server: str | None) -> reltrace.Client:
        # An option wins over the environment, where the client looks for what is None.
        return reltrace.Client(server, token=self.token_file, tls=self.tls, insecure=self.insecure)


def access_of(context: typer.Context) -> Access:
    """Return what the options before the command say."""
    access = context.find_object(Access)
    assert access is not None
    return access
