"""Checks that several kinds of requests share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from reltrace_worker.engine.sites import SITES
from reltrace_worker.models.loading import ModelShape
from reltrace_worker.types.errors import Faults
from reltrace_worker.types.jobs import Edit

MAX_EDITS = 256
"""Most edits of one job."""

LARGEST_EDIT = 1e9
"""A norm squares what flows through it, which has to stay within float32."""


def check_name(kind: str, name: str, known: Collection[str], field: str, faults: Faults) -> bool:
    allowed = ", ".join(known)
    faults.require(name in known, field, f"{kind} {name!r} is unknown; allowed: {allowed}")
    return name in known


def check_layer(layer: int, layers: int, field: str, faults: Faults) -> None:
    what = f"layer {layer} does not exist; allowed: 0 to {layers - 1}"
    faults.require(0 <= layer < layers, field, what)


def check_position(position: int, tokens: int, field: str, faults: Faults) -> None:
    """Check a position in a prompt of so many tokens; 0: it is at fault itself."""
    what = (
        f"position {position} is outside the prompt of {tokens} tokens; allowed: "
        f"{-tokens} to {tokens - 1}"
    )
    faults.require(not tokens or -tokens <= position < tokens, field, what)


def check_edits(
    edits: Sequence[Edit], shape: ModelShape, tokens: int, faults: Faults
) -> tuple[Edit, ...]:
    """Check the edits of a prompt of so many tokens; return them with positions from 0."""
    too_many = f"has {len(edits)}; at most {MAX_EDITS} are allowed"
    faults.require(len(edits) <= MAX_EDITS, "edits", too_many)
    for index, edit in enumerate(edits):
        _check_edit(edit, f"edits[{index}]", shape, tokens, faults)
    return tuple(
        replace(edit, positions=tuple(p % tokens for p in edit.positions) if tokens else ())
        for edit in edits
    )


def _check_edit(edit: Edit, field: str, shape: ModelShape, tokens: int, faults: Faults) -> None:
    if not check_name("site", edit.site, SITES, f"{field}.site", faults):
        return
    site = SITES[edit.site]
    check_layer(edit.layer, shape.layers if site.per_layer else 1, f"{field}.layer", faults)
    width = site.features(shape)
    for index, feature in enumerate(edit.features):
        what = f"{edit.site} has no feature {feature}; allowed: 0 to {width - 1}"
        faults.require(0 <= feature < width, f"{field}.features[{index}]", what)
    for index, position in enumerate(edit.positions):
        check_position(position, tokens, f"{field}.positions[{index}]", faults)
    if edit.direction and edit.site == "head":
        faults.add(f"{field}.direction", "is not for heads: they are sums; use scale or value")
    elif edit.direction and len(edit.direction) != width:
        what = f"has {len(edit.direction)} values; {edit.site} has {width} features"
        faults.add(f"{field}.direction", what)
    if edit.direction and edit.features:
        faults.add(f"{field}.features", "is not for a direction, which has a value for every one")
    if edit.mean and edit.site != "embed":
        faults.add(f"{field}.mean", f"is for the site embed, not {edit.site}")
    if edit.mean and edit.features:
        faults.add(f"{field}.features", "is not for the mean, which is set as a whole")
    numbers = (edit.scale, edit.value, *edit.direction)
    what = f"has a number beyond what is allowed: {-LARGEST_EDIT:g} to {LARGEST_EDIT:g}"
    faults.require(all(abs(number) <= LARGEST_EDIT for number in numbers), field, what)
