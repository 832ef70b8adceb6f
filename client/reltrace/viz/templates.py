"""HTML by jinja2: every value that a template shows is escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup


def template(name: str) -> Template:
    return _environment().get_template(name)


def page(name: str, *, title: str, about: str, data: Any) -> str:
    """Return a page that loads nothing: template, script and style of a name, and data as JSON."""
    return template(f"{name}.html").render(name=name, title=title, about=about, data=data)


@cache
def _environment() -> Environment:
    loader = PackageLoader("reltrace.viz")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    # Scripts and styles are not templates.
    environment.globals["asset"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment
