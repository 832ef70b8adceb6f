"""The file of a plot: its ending says what it is."""

from __future__ import annotations

import os
from pathlib import Path

from reltrace.storage.atomic_files import check_writable, replace_file
from reltrace.types.errors import MissingDependency, invalid
from reltrace.types.neurons import Labels
from reltrace.types.trace import Trace

_PAGES = (".html", ".htm")
_PICTURES = (".png", ".svg", ".pdf")


def check_path(
    path: str | os.PathLike[str], *, pages: bool = True, with_labels: bool = False
) -> Path:
    """Return the path of a plot if it can be written; labels of an atlas need a page."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (*_PICTURES, *(_PAGES if pages else ())):
        allowed = ".png, .svg, .pdf or .html" if pages else ".png, .svg or .pdf"
        raise invalid("plot", f"must end in {allowed}, not {path.name!r}")
    check_writable(path, "plot")
    if ending in _PICTURES:
        if with_labels:
            raise invalid("atlas", f"has labels for .html, not for {ending}")
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            hint = " (an .html plot needs nothing)" if pages else ""
            raise MissingDependency(
                f"pictures need matplotlib: pip install 'reltrace[plot]'{hint}"
            ) from None
    return path


def write(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    site: str,
    normalize: bool,
    atlas: Labels | None = None,
) -> Path:
    """Write the plot of a trace. See `Trace.plot`."""
    path = check_path(path, with_labels=atlas is not None)
    if path.suffix.lower() in _PAGES:
        from reltrace.viz.trace_page import trace_page

        text = trace_page(trace, site=site, normalize=normalize, atlas=atlas)
        with replace_file(path, durable=False) as file:
            file.write(text.encode())
    else:
        from reltrace.viz.heatmap import write_heatmap

        write_heatmap(trace, path, site=site, normalize=normalize)
    return path
