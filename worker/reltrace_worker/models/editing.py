"""Checks the edits of a job against the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from reltrace_worker.models.loading import ModelShape
from reltrace_worker.types.jobs import EditSpec

MAX_EDITS = 256
"""Most edits of one job."""

LARGEST_EDIT = 1e9
"""A norm squares what flows through it, which has to stay within float32."""


class SiteExtent(Protocol):
    """What has to be known of a site."""

    @property
    def features(self) -> Callable[[ModelShape], int]:
        """From the model's shape to the length of the feature axis."""

    @property
    def per_layer(self) -> bool:
        """Whether every decoder layer has it."""


class EditChecker:
    """Checks edits, and counts their positions from 0.

    Parameters
    ----------
    shape
        Of the model.
    sites
        By name.
    """

    def __init__(self, shape: ModelShape, sites: Mapping[str, SiteExtent]) -> None:
        self._shape = shape
        self._sites = sites

    def prepare(
        self, edits: Sequence[EditSpec], tokens: int, fault: Callable[[str, str], None]
    ) -> tuple[EditSpec, ...]:
        """Return the edits of a prompt of so many tokens.

        Parameters
        ----------
        fault
            Called with the field and what is wrong with it.
        """
        if len(edits) > MAX_EDITS:
            fault("edits", f"has {len(edits)}; at most {MAX_EDITS} are allowed")
        prepared = []
        for index, edit in enumerate(edits):
            self._check(edit, f"edits[{index}]", tokens, fault)
            positions = tuple(p % tokens for p in edit.positions) if tokens else ()
            prepared.append(replace(edit, positions=positions))
        return tuple(prepared)

    def _check(
        self, edit: EditSpec, field: str, tokens: int, fault: Callable[[str, str], None]
    ) -> None:
        site = self._sites.get(edit.site)
        if site is None:
            known = ", ".join(self._sites)
            fault(f"{field}.site", f"site {edit.site!r} is unknown; allowed: {known}")
            return
        layers = self._shape.layers if site.per_layer else 1
        if not 0 <= edit.layer < layers:
            fault(
                f"{field}.layer",
                f"layer {edit.layer} does not exist; allowed: 0 to {layers - 1}",
            )
        width = site.features(self._shape)
        for place, feature in enumerate(edit.features):
            if not 0 <= feature < width:
                fault(
                    f"{field}.features[{place}]",
                    f"{edit.site} has no feature {feature}; allowed: 0 to {width - 1}",
                )
        for place, position in enumerate(edit.positions):
            if tokens and not -tokens <= position < tokens:
                fault(
                    f"{field}.positions[{place}]",
                    f"position {position} is outside the prompt of {tokens} tokens; allowed: "
                    f"{-tokens} to {tokens - 1}",
                )
        if edit.direction:
            self._check_direction(edit, field, width, fault)
        if edit.mean and edit.site != "embed":
            fault(f"{field}.mean", f"is for the site embed, not {edit.site}")
        if edit.mean and edit.features:
            fault(f"{field}.features", "is not for the mean, which is set as a whole")
        if not all(abs(n) <= LARGEST_EDIT for n in (edit.scale, edit.value, *edit.direction)):
            fault(
                field, f"has a number beyond what is allowed: {-LARGEST_EDIT:g} to {LARGEST_EDIT:g}"
            )

    def _check_direction(
        self, edit: EditSpec, field: str, width: int, fault: Callable[[str, str], None]
    ) -> None:
        if edit.site == "head":
            fault(f"{field}.direction", "is not for heads: they are sums; use scale or value")
        elif len(edit.direction) != width:
            fault(
                f"{field}.direction",
                f"has {len(edit.direction)} values; {edit.site} has {width} features",
            )
        if edit.features:
            fault(f"{field}.features", "is not for a direction, which has a value for every one")
