"""Traces made by hand, for tests that need no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import reltrace

TOKENS = ["<s>", "ĠMy", "Ġcats", "</script>", "$x_1$"]


def make_trace(
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    tokens: list[str] | None = None,
    reduction: str = "token",
    id: str | int | None = None,  # noqa: A002 - as in Trace
    layers: tuple[int, ...] = (),
) -> reltrace.Trace:
    rng = np.random.default_rng(0)
    tokens = tokens or TOKENS
    return reltrace.Trace(
        tokens=tokens,
        token_ids=list(range(len(tokens))),
        target=reltrace.ResolvedTarget("Ġdogs", 42, 17.25, len(tokens) - 1),
        provenance=reltrace.Provenance(
            model="tiny",
            revision="r1",
            rule="attnlrp",
            reduction=reduction,
            dtype="float32",
            attention="sdpa",
            checkpointing=True,
            device="cpu",
            versions={"lxt": "2.1", "torch": "2.13.0"},
        ),
        arrays={
            site: {"": rng.standard_normal(shape).astype(np.float32)}
            for site, shape in (shapes or {"resid": (3, 5)}).items()
        },
        id=id,
        layers=layers,
    )


def with_text(trace: reltrace.Trace) -> reltrace.Trace:
    """Return a trace of the text that its tokens make, one after another."""
    spans = list(pairwise(accumulate(map(len, trace.tokens), initial=0)))
    return replace(trace, text="".join(trace.tokens), offsets=np.array(spans))
