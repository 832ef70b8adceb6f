"""`python -m reltrace_scheduler.local`: `reltrace up` without the package `reltrace`."""

import typer

from reltrace_scheduler.local.command import up

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(up)

if __name__ == "__main__":
    app()
