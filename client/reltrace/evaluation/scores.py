"""The arithmetic: orders, how many to switch off, areas, confidence intervals."""

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
        """Return the mean of some values."""
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


def shares(points: int) -> Floats:
    """Return the shares that are switched off: `points` equal steps from none to all."""
    return np.linspace(0.0, 1.0, points + 1)


def on_axis(site: str, at: Floats) -> Floats:
    """Return where points are on the axis of a curve, from 0 to 1, as it is drawn and integrated.

    Shares of tokens are where they are. Of neurons, a few of thousands make most of the difference:
    n of them are at log(1 + n), the last point at 1.
    """
    return np.log1p(at) / np.log1p(at[-1]) if site == "neuron" else at


def tokens_at(share: float, tokens: int) -> int:
    """Return how many of so many tokens a share is, to the nearest."""
    return int(np.floor(share * tokens + 0.5))


def area(most: Floats, least: Floats, at: Floats) -> float:
    """Return the area between the curves, least relevant first minus most relevant first.

    In units of the target, on an axis from 0 to 1: the larger, the better the order tells what the
    target rests on; 0 for an order that says nothing. (Blücher, Vielhaben & Strodthoff, "Decoupling
    pixel flipping and occlusion strategy for consistent XAI benchmarks", 2024; used for AttnLRP by
    Achtibat et al., 2024, section 4.1.)

    Parameters
    ----------
    most, least
        float64 [P]: the target after each step, most and least relevant first.
    at
        float64 [P]: where on the axis, rising from 0 to 1: see `on_axis`. Between points the curves
        are straight there.
    """
    return float(np.trapezoid(least - most, at))
