"""The file that a trace is drawn into: its ending says what it is."""

from __future__ import annotations

import os
from pathlib import Path

from reltrace.types.errors import invalid
from reltrace.types.neurons import Labels
from reltrace.types.trace import Trace

_PAGES = (".html", ".htm")
_PICTURES = (".png", ".svg", ".pdf")


def check_path(path: str | os.PathLike[str], *, with_labels: bool = False) -> Path:
    """Return the path if `write` can write it.

    Raises
    ------
    InvalidArgument
        If its ending says nothing that can be written, or nothing that has room for labels.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (*_PAGES, *_PICTURES):
        raise invalid("plot", f"must end in .png, .svg, .pdf or .html, not {path.name!r}")
    if with_labels and ending not in _PAGES:
        raise invalid("atlas", f"has labels for .html, not for {ending}")
    return path


def write(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    site: str,
    normalize: bool,
    atlas: Labels | None = None,
) -> Path:
    """Write the file. See `Trace.plot`."""
    path = check_path(path, with_labels=atlas is not None)
    if path.suffix.lower() in _PAGES:
        from reltrace.viz import trace_page

        trace_page.write(trace, path, site=site, normalize=normalize, atlas=atlas)
    else:
        from reltrace.viz import plot

        plot.write(trace, path, site=site, normalize=normalize)
    return path
