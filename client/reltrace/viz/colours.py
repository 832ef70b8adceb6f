"""What pictures of a trace share: colours, and the value that colours a token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.errors import invalid
from reltrace.types.trace import Trace

# The ends of ColorBrewer's RdBu, which people with any kind of colour blindness tell apart,
# and its middle.
NEGATIVE = (33, 102, 172)
ZERO = (255, 255, 255)
POSITIVE = (178, 24, 43)
COLOURS = {"negative": NEGATIVE, "zero": ZERO, "positive": POSITIVE}

# Sites whose first layer is nearest to the input; the others add to the stream layer by layer.
STREAM_SITES = frozenset({"resid", "resid_mid"})


def colour(value: float) -> tuple[int, int, int]:
    """Return the colour of a value from -1 (blue) over 0 (white) to 1 (red)."""
    if not np.isfinite(value):
        return (128, 128, 128)
    end = POSITIVE if value > 0 else NEGATIVE
    share = min(1.0, abs(value))
    red, green, blue = (round(z + (e - z) * share) for z, e in zip(ZERO, end, strict=True))
    return red, green, blue


def css(shade: tuple[int, int, int]) -> str:
    return f"#{shade[0]:02x}{shade[1]:02x}{shade[2]:02x}"


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is easier to read on a colour (Rec. 709 luma)."""
    red, green, blue = background
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140
    return (0, 0, 0) if light else (255, 255, 255)


class TokenValues(NamedTuple):
    """The raw relevance of each token."""

    values: NDArray[np.float32]
    title: str
    """What the values are, for a legend."""
    site: str


def token_values(trace: Trace) -> TokenValues:
    """Return the values that colour the text of the tokens.

    A reader wants to see the relevance of the input: "embed"; in the residual stream the lowest
    layer, which is nearest to it (later layers have moved it to the last token); of the sites that
    add to the stream, the sum over layers.
    """
    if not trace.sites:
        raise invalid("site", "is not there: no site was requested")
    site = next((name for name in ("embed", "resid") if name in trace.sites), trace.sites[0])
    values = trace.by_token(site).astype(np.float32)
    if site in SITES_WITHOUT_LAYERS:
        return TokenValues(values, f"site {site}", site)
    if site in STREAM_SITES:
        numbers = layer_numbers(trace, len(values))
        first = min(numbers)
        return TokenValues(values[numbers.index(first)], f"site {site}, layer {first}", site)
    return TokenValues(values.sum(axis=0), f"site {site}, sum over layers", site)


def layer_numbers(trace: Trace, count: int) -> tuple[int, ...]:
    """Return the numbers of the `count` layers of a site; older traces do not name them."""
    return trace.layers or tuple(range(count))


def scaled(values: Array) -> NDArray[np.float32]:
    """Return values divided by their largest finite absolute value; zeros stay zeros."""
    finite = np.abs(values[np.isfinite(values)])
    largest = np.float32(finite.max()) if finite.size and finite.max() > 0 else np.float32(1)
    return np.divide(values, largest, dtype=np.float32)
