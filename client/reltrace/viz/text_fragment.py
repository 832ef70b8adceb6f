"""What a notebook shows of a text that a model wrote: beside it, the same without steering."""

from __future__ import annotations

import html

from reltrace.types.generation import Generation
from reltrace.types.token_text import readable_all
from reltrace.viz.notebook_html import BOX, GREY, HINT

_CELL = "flex:1;min-width:14em;white-space:pre-wrap;overflow-wrap:anywhere"


def text_fragment(found: Generation) -> str:
    """Return the prompt and what was written, HTML without scripts."""
    texts = [("", found)]
    if found.unsteered is not None:
        texts = [("as it is", found.unsteered), ("steered", found)]
    prompt = html.escape(found.prompt_text or "".join(readable_all(found.prompt_tokens)))
    cells = "".join(_cell(title, prompt, one) for title, one in texts)
    hints = "".join(f'<div style="{HINT}">{html.escape(hint)}</div>' for hint in found.hints)
    origin = html.escape(found.provenance.model)
    return (
        f'<div style="{BOX}"><div style="display:flex;flex-wrap:wrap;gap:1.5em">{cells}</div>'
        f'{hints}<div style="{GREY}">model {origin}</div></div>'
    )


def _cell(title: str, prompt: str, one: Generation) -> str:
    ended = "" if one.stopped else '<span style="color:#666"> …</span>'
    return (
        f'<div style="{_CELL}"><div style="{GREY}">{title}</div>'
        f'<span style="color:#666">{prompt}</span><b>{html.escape(one.text)}</b>{ended}</div>'
    )
