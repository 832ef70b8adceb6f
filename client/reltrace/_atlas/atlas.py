"""Reading an atlas: the contexts of a neuron or a head, and what was counted of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from reltrace._atlas.folder import Folder
from reltrace._atlas.merged import quantile
from reltrace._atlas.part import LISTS, MEASURES
from reltrace._errors import invalid
from reltrace._trace import Array


@dataclass(frozen=True, slots=True)
class Context:
    """A place in the corpus where a neuron or head is strong.

    Attributes
    ----------
    value : float
        Relevance or activation there.
    prompt : int
        Number of the prompt in the corpus.
    position : int
        Index of the token.
    tokens : tuple of str
        The prompt's tokens.
    """

    value: float
    prompt: int
    position: int
    tokens: tuple[str, ...]

    @property
    def token(self) -> str:
        """The token where it is strong."""
        return self.tokens[self.position]


@dataclass(frozen=True, eq=False)
class Feature:
    """A neuron or head of an atlas.

    Attributes
    ----------
    site : str
        "neuron" or "head".
    layer, index : int
        Which.
    contexts : dict of str to list of Context
        "relevance+", "relevance-", "activation+", "activation-": the strongest first.
    count : int
        Tokens that were seen.
    mean : dict of str to float
        Of "relevance" and "activation", over all tokens.
    """

    site: str
    layer: int
    index: int
    contexts: dict[str, list[Context]]
    count: int
    mean: dict[str, float]
    _histograms: dict[str, Array]

    def quantile(self, share: float, measure: str = "relevance") -> float:
        """Return the value below which a share of all tokens' values lies, to within its octave."""
        if measure not in MEASURES:
            raise invalid("measure", f"must be one of {', '.join(MEASURES)}, not {measure!r}")
        if not 0 <= share <= 1:
            raise invalid("share", f"must be 0 to 1, not {share}")
        return quantile(self._histograms[measure], share)


class Atlas:
    """An atlas that `reltrace atlas build` or `Client.build_atlas` made.

    Parameters
    ----------
    path : path
        Its folder.

    Raises
    ------
    InvalidArgument
        There is none, or it is damaged.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._folder = Folder(Path(path))
        self._state = self._folder.read()
        self._slice = lru_cache(maxsize=64)(self._read_slice)

    @property
    def about(self) -> dict[str, Any]:
        """Model, revision, rule, places of each list, prompts of a slice."""
        return dict(self._state.about)

    @property
    def tokens(self) -> int:
        """How many were seen."""
        return self._state.tokens

    @property
    def skipped(self) -> dict[int, str]:
        """Prompts that were left out, by their number, and why."""
        return dict(self._state.skipped)

    def neuron(self, layer: int, index: int) -> Feature:
        """Return a neuron of the MLP of a decoder layer."""
        return self._feature("neuron", layer, index)

    def head(self, layer: int, index: int) -> Feature:
        """Return an attention head of a decoder layer."""
        return self._feature("head", layer, index)

    def _feature(self, site: str, layer: int, index: int) -> Feature:
        merged = self._state.sites[site]
        layers, _, _, features = merged.values.shape
        if not 0 <= layer < layers:
            raise invalid("layer", f"must be 0 to {layers - 1}, not {layer}")
        if not 0 <= index < features:
            raise invalid(site, f"must be 0 to {features - 1}, not {index}")
        sums = merged.sums()[layer, :, index]
        return Feature(
            site=site,
            layer=layer,
            index=index,
            contexts={
                name: self._contexts(site, layer, index, place) for place, name in enumerate(LISTS)
            },
            count=self._state.tokens,
            mean={
                measure: float(total) / self._state.tokens if self._state.tokens else float("nan")
                for measure, total in zip(MEASURES, sums, strict=True)
            },
            _histograms={
                measure: merged.histogram[layer, place, index]
                for place, measure in enumerate(MEASURES)
            },
        )

    def _contexts(self, site: str, layer: int, index: int, which: int) -> list[Context]:
        merged = self._state.sites[site]
        sign = -1.0 if LISTS[which].endswith("-") else 1.0
        rows = zip(
            merged.values[layer, which, :, index].tolist(),
            merged.prompts[layer, which, :, index].tolist(),
            merged.tokens[layer, which, :, index].tolist(),
            strict=True,
        )
        return [
            Context(sign * value, prompt, token, self.prompt(prompt))
            for value, prompt, token in rows
            if prompt >= 0
        ]

    def prompt(self, number: int) -> tuple[str, ...]:
        """Return the tokens of a prompt of the corpus; none where it was left out."""
        slice_, index = divmod(number, self._state.about["slice"])
        if slice_ not in self._state.digests:
            raise invalid("number", f"the corpus has no prompt {number}")
        ids, ends, lengths = self._slice(slice_)
        if index >= len(lengths):
            raise invalid("number", f"the corpus has no prompt {number}")
        own = ids[ends[index] - lengths[index] : ends[index]]
        return tuple(self._state.vocabulary[token] for token in own.tolist())

    def _read_slice(self, number: int) -> tuple[Array, Array, Array]:
        ids, lengths = self._folder.corpus(number)
        return ids, np.cumsum(lengths), lengths
