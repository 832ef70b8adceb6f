"""What a prompt of a batch may have for itself: what leaves the folder's traces comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reltrace.batch.folder import Settings
from reltrace.types.errors import invalid


def check_own(arguments: Mapping[str, Any], settings: Settings) -> None:
    """Check what a prompt says itself against what its folder can hold.

    Whether an own model is the batch's where the batch names none, only the trace tells.

    Parameters
    ----------
    arguments : mapping of str to object
        Arguments of `trace` that the prompt has for itself; their values are not checked yet.
    settings : Settings
        Those of the batch.

    Raises
    ------
    InvalidArgument
        Naming the argument, and what the folder holds.
    """
    wanted: dict[str, Any] = {"rule": settings.rule, "reduce": settings.reduce}
    if settings.model is not None:
        wanted["model"] = settings.model
    if settings.format == "parquet":
        # A column of its own per site, of one type, and as long as all others.
        wanted |= {"dtype": settings.dtype, "output_uri": settings.output_uri}
        if not _are_same_sites(arguments.get("sites", settings.sites), settings.sites):
            wanted["sites"] = settings.sites
    for name, value in wanted.items():
        if name in arguments and arguments[name] != value:
            held = f"{name} {value!r}" if value is not None else f"no {name}"
            raise invalid(
                name,
                f"is {arguments[name]!r} for this prompt, and the folder holds traces with {held} "
                "only; leave it out, or trace the prompt into another folder",
            )


def _are_same_sites(own: Any, sites: list[str]) -> bool:
    """Tell whether the sites are the same; their order, like a repeated name, is told elsewhere."""
    names = [own] if isinstance(own, str) else own
    return (
        isinstance(names, list)
        and all(name in sites for name in names)
        and all(site in names for site in sites)
    )
