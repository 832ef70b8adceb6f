"""The arithmetic: orders, steps, areas, confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over prompts.

    Attributes
    ----------
    mean : float
        The mean; nan without values.
    margin : float
        Half the width of its 95 % confidence interval, by the normal approximation: 1.96
        standard errors. nan with fewer than two values.
    count : int
        Of values.
    """

    mean: float
    margin: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> Mean:
        found = np.asarray(values, np.float64)
        count = len(found)
        if not count:
            return cls(float("nan"), float("nan"), 0)
        margin = _Z95 * float(found.std(ddof=1)) / count**0.5 if count > 1 else float("nan")
        return cls(float(found.mean()), margin, count)

    def __str__(self) -> str:
        # A single value has no interval.
        return f"{self.mean:.3f}" + (f" ± {self.margin:.3f}" if self.count > 1 else "")


def strongest_first(scores: Floats) -> NDArray[np.int64]:
    """Return indices by falling score; of equal ones, the lower index first."""
    return np.argsort(-scores, kind="stable")


def on_axis(site: str, at: Floats) -> Floats:
    """Return points on the axis on which curves are drawn and integrated, from 0 to 1.

    Shares of tokens are the axis. A few of thousands of neurons make most of the difference: n of
    them are at log(1 + n), scaled so that the last point is at 1.
    """
    return np.log1p(at) / np.log1p(at[-1]) if site == "neuron" else at


def tokens_at(share: float, tokens: int) -> int:
    """Return a share of `tokens` as a whole number, halves rounded up."""
    return int(np.floor(share * tokens + 0.5))


def area(most: Floats, least: Floats, at: Floats) -> float:
    """Return the area between two curves by trapezoids: least minus most relevant first.

    float64 [P] each: the target after each step, and the points on the axis of `on_axis`. The
    larger, the better the order tells what the target rests on; 0 for a random order. (Blücher,
    Vielhaben & Strodthoff, "Decoupling pixel flipping and occlusion strategy for consistent XAI
    benchmarks", 2024; used for AttnLRP by Achtibat et al., 2024, section 4.1.)
    """
    return float(np.trapezoid(least - most, at))
