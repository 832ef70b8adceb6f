"""Pages in one file: markup, style, script and data together, which load nothing from anywhere."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any


def filled(page: str, *, title: str, about: str, data: Any) -> str:
    """Return a page's text.

    Parameters
    ----------
    page : str
        Its folder in ``pages``, with ``page.html``, ``page.css`` and ``page.js``.
    title, about : str
        Plain text, for the heading and the foot.
    data : object
        What the script reads, for JSON.
    """
    at = files("reltrace.viz") / "pages" / page
    values = {
        "TITLE": html.escape(title),
        "ABOUT": html.escape(about),
        "STYLE": at.joinpath("page.css").read_text("utf-8"),
        "SCRIPT": at.joinpath("page.js").read_text("utf-8"),
        "DATA": _script_safe(json.dumps(data, ensure_ascii=False, allow_nan=False)),
    }
    # In one pass: what a prompt says is not looked at for further placeholders.
    markup = at.joinpath("page.html").read_text("utf-8")
    return re.sub("%%([A-Z]+)%%", lambda match: values[match.group(1)], markup)


def _script_safe(text: str) -> str:
    # Inside <script>, "</script>" and "<!--" would end or change the element wherever they stand.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
