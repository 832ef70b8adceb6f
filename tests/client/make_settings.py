"""The settings of an evaluation, for tests of its parts."""

from __future__ import annotations

from typing import Any

from reltrace.evaluation.settings import Settings


def make_settings(**given: Any) -> Settings:
    """Settings with the defaults of `evaluate`."""
    settings = {"rules": ["gradient"], "site": "embed", "points": 10, "seed": 0}
    settings |= {"measure": "logprob", "replace": "zero", "keep": "special"}
    return Settings(**settings | given)
