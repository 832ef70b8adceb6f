"""Checks the edits of a request against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reltrace_worker.engine.sites import SITES
from reltrace_worker.models.loading import ModelShape
from reltrace_worker.types.errors import Faults
from reltrace_worker.types.jobs import Edit

MAX_EDITS = 256
"""Most edits of one job."""

LARGEST_EDIT = 1e9
"""A norm squares what flows through it, which has to stay within float32."""


def check_edits(
    edits: Sequence[Edit], shape: ModelShape, tokens: int, faults: Faults
) -> tuple[Edit, ...]:
    """Check the edits of a prompt of so many tokens; return them with positions from 0."""
    if len(edits) > MAX_EDITS:
        faults.add("edits", f"has {len(edits)}; at most {MAX_EDITS} are allowed")
    for index, edit in enumerate(edits):
        _check_edit(edit, f"edits[{index}]", shape, tokens, faults)
    return tuple(
        replace(edit, positions=tuple(p % tokens for p in edit.positions) if tokens else ())
        for edit in edits
    )


def _check_edit(edit: Edit, field: str, shape: ModelShape, tokens: int, faults: Faults) -> None:
    site = SITES.get(edit.site)
    if site is None:
        known = ", ".join(SITES)
        faults.add(f"{field}.site", f"site {edit.site!r} is unknown; allowed: {known}")
        return
    layers = shape.layers if site.per_layer else 1
    if not 0 <= edit.layer < layers:
        faults.add(
            f"{field}.layer", f"layer {edit.layer} does not exist; allowed: 0 to {layers - 1}"
        )
    width = site.features(shape)
    for index, feature in enumerate(edit.features):
        if not 0 <= feature < width:
            faults.add(
                f"{field}.features[{index}]",
                f"{edit.site} has no feature {feature}; allowed: 0 to {width - 1}",
            )
    for index, position in enumerate(edit.positions):
        if tokens and not -tokens <= position < tokens:
            faults.add(
                f"{field}.positions[{index}]",
                f"position {position} is outside the prompt of {tokens} tokens; allowed: "
                f"{-tokens} to {tokens - 1}",
            )
    if edit.direction and edit.site == "head":
        faults.add(f"{field}.direction", "is not for heads: they are sums; use scale or value")
    elif edit.direction and len(edit.direction) != width:
        faults.add(
            f"{field}.direction",
            f"has {len(edit.direction)} values; {edit.site} has {width} features",
        )
    if edit.direction and edit.features:
        faults.add(f"{field}.features", "is not for a direction, which has a value for every one")
    if edit.mean and edit.site != "embed":
        faults.add(f"{field}.mean", f"is for the site embed, not {edit.site}")
    if edit.mean and edit.features:
        faults.add(f"{field}.features", "is not for the mean, which is set as a whole")
    if not all(abs(n) <= LARGEST_EDIT for n in (edit.scale, edit.value, *edit.direction)):
        faults.add(
            field, f"has a number beyond what is allowed: {-LARGEST_EDIT:g} to {LARGEST_EDIT:g}"
        )
