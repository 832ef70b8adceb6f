"""A relevance trace: the result of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reltrace.types import neurons, top_entries
from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.errors import InvalidArgument, invalid
from reltrace.types.neurons import Labels, StrongHead, StrongNeuron
from reltrace.types.provenance import Provenance, ResolvedTarget, Timings
from reltrace.types.tokens import FirstTokenShare, Turn
from reltrace.types.top_entries import Entry

if TYPE_CHECKING:
    import pandas as pd

_PER_TOKEN = ("token", "full")


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Relevance of every token at the requested sites, for one target.

    A relevance is ``R = x * dL/dx``: a site's value times the gradient of the target `L`
    under the propagation rule, where the backward pass starts at 1. Values are raw, in units
    of the logit; `normalized` gives each layer divided by its largest absolute value, which is
    what LXT's example shows (up to the sign of the logit, which the example multiplies by).

    Attributes
    ----------
    tokens : list of str
        The texts of the prompt's T tokens, which a target takes back. A token that holds only a
        part of a character is named by its bytes, or as the model's tokenizer writes it.
    token_ids : list of int
        Their ids.
    target : ResolvedTarget
        The target as the worker resolved it.
    provenance : Provenance
        The model, rule and versions that computed the trace.
    arrays : mapping of str to mapping of str to ndarray
        The tensors by site and part; a site that is one tensor has the one part "". Use
        ``trace[site]``.
    id : str or int or None
        The item's id in `trace_many`; None for `trace`.
    layers : tuple of int
        Numbers of the decoder layers along the layer axis of the sites, counted from 0. Empty if
        an older version made the trace.
    timings : Timings or None
        How long the job was queued and computed; not saved, so None after `load`.
    job_id : str or None
        The job's id in the server's logs; not saved either.
    text, offsets, turns, hints, special_positions
        The prompt as the model read it, as in `Tokens`. `text` is empty, and `offsets` of shape
        [0, 2], if an older version made the trace.
    """

    tokens: list[str]
    token_ids: list[int]
    target: ResolvedTarget
    provenance: Provenance
    arrays: Mapping[str, Mapping[str, Array]]
    id: str | int | None = None
    layers: tuple[int, ...] = ()
    timings: Timings | None = None
    job_id: str | None = None
    text: str = ""
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    turns: tuple[Turn, ...] = ()
    hints: tuple[str, ...] = ()
    special_positions: tuple[int, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The requested sites, in the order they were asked for."""
        return tuple(self.arrays)

    @property
    def relevance(self) -> Array:
        """Relevance at site "resid", or at the first requested site if that is not there.

        float32 of shape [layers, tokens] for the reduction "token". See `__getitem__`.
        """
        if not self.arrays:
            raise KeyError("no site was requested: the trace has its target alone")
        return self["resid" if "resid" in self.arrays else self.sites[0]]

    def __getitem__(self, site: str) -> Array:
        """Return the relevance at a site.

        Parameters
        ----------
        site : str
            One of `sites`.

        Returns
        -------
        ndarray
            Shape [L, T] for the reduction "token", [L, F] for "feature", [L, T, F] for "full"
            (L layers, T tokens, F hidden size, heads or neurons of the site); without the
            first axis for the site "embed". float32 if "float32" or "bfloat16" was asked for
            (numpy has no bfloat16, and float32 holds its values exactly), float16 if "float16".

        Raises
        ------
        KeyError
            If the site was not requested, or consists of several tensors (see `parts`).
        """
        parts = self.parts(site)
        if "" not in parts:
            raise KeyError(f"site {site!r} has parts {', '.join(parts)}: use trace.parts({site!r})")
        return parts[""]

    def parts(self, site: str) -> Mapping[str, Array]:
        """Return all tensors of a site by part; a site that is one tensor has the part ""."""
        if site not in self.arrays:
            raise KeyError(f"site {site!r} was not requested; there are {', '.join(self.sites)}")
        return self.arrays[site]

    def normalized(self, site: str | None = None) -> NDArray[np.float32]:
        """Return the relevance with each layer divided by its largest absolute value.

        Parameters
        ----------
        site : str, optional
            One of `sites`; default as in `relevance`.

        Returns
        -------
        ndarray of float32
            Of the same shape, values from -1 to 1. A layer that is zero throughout stays zero.
        """
        site = self._site(site)
        values: NDArray[np.float32] = self[site].astype(np.float32)
        layered = site not in SITES_WITHOUT_LAYERS
        axes = tuple(range(1 if layered else 0, values.ndim))
        largest = np.abs(values).max(axis=axes, keepdims=True)
        # Not values * (1 / largest): the reciprocal of a subnormal overflows.
        divisor = np.where(largest == 0, np.float32(1), largest)
        return np.divide(values, divisor, dtype=np.float32)

    def by_token(self, site: str | None = None) -> Array:
        """Return the relevance per token: [L, T], or [T] for the site "embed".

        Sums over the features of a "full" trace.

        Raises
        ------
        InvalidArgument
            If the reduction summed over the tokens.
        """
        site = self._site(site)
        # The shape does not tell, since there may be as many tokens as features.
        if self.provenance.reduction not in _PER_TOKEN:
            raise self._no_value_per_token()
        values = self[site]
        ndim = 1 if site in SITES_WITHOUT_LAYERS else 2
        if values.ndim == ndim + 1:
            values = values.sum(axis=-1, dtype=np.float32)
        if values.ndim != ndim or values.shape[-1] != len(self.tokens):
            raise self._no_value_per_token()
        return values

    def first_token_share(self, site: str | None = None) -> FirstTokenShare:
        """Return the share of |R| at the first token.

        Heads attend to the first token where they need no other, so that it may have much relevance
        that says little about the prompt: NUMBERS.md says what to do then.

        Parameters
        ----------
        site : str, optional
            One of `sites`; default as in `relevance`.

        Returns
        -------
        FirstTokenShare
            Its `total`, and its `layers` one by one. nan where everything is 0.

        Raises
        ------
        InvalidArgument
            If the reduction left no value per token.
        """
        size = np.abs(np.atleast_2d(self.by_token(site)), dtype=np.float64)
        with np.errstate(invalid="ignore"):
            layers = size[:, 0] / size.sum(axis=1)
            return FirstTokenShare(float(size[:, 0].sum() / size.sum()), layers)

    def _no_value_per_token(self) -> InvalidArgument:
        return invalid(
            "reduce",
            f'{self.provenance.reduction!r} leaves no value per token; use "token" or "full"',
        )

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        site: str | None = None,
        normalize: bool = True,
        atlas: Labels | None = None,
    ) -> Path:
        """Write the layers-by-tokens heatmap.

        Parameters
        ----------
        path : path
            Its suffix selects the format: .png, .svg or .pdf (needs ``reltrace[plot]``), or .html
            for a self-contained page that shows values on hovering.
        site : str, optional
            One of `sites`; default as in `relevance`.
        normalize : bool, default True
            Divide each layer by its largest absolute value, as LXT's example does.
        atlas : Atlas, optional
            For .html: the page's strongest neurons and heads get its labels.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        InvalidArgument
            If the suffix is another one, the trace has no value per token, or the atlas is of
            another model or revision.
        MissingDependency
            If matplotlib is needed and missing.
        """
        from reltrace.viz import files

        return files.write(self, path, site=self._site(site), normalize=normalize, atlas=atlas)

    def top(self, k: int = 10, site: str | None = None) -> list[Entry]:
        """Return the entries with the largest |R|, for every reduction.

        Parameters
        ----------
        k : int, default 10
            How many; a trace with fewer gives all.
        site : str, optional
            One of `sites`; default as in `relevance`.

        Returns
        -------
        list of Entry
            The largest first, each with its layer, token and feature, unless the reduction has
            summed over them.

        Raises
        ------
        InvalidArgument
            If `k` is not a whole number from 1 on, or the site was not requested.
        """
        return top_entries.strongest(self, k, self._site(site))

    def neurons(self, k: int = 10, atlas: Labels | None = None) -> list[StrongNeuron]:
        """Return the strongest neurons, for every reduction that leaves single neurons.

        Parameters
        ----------
        k : int, default 10
            How many; a trace with fewer gives all.
        atlas : Atlas, optional
            Gives them their labels; of the same model and revision.

        Returns
        -------
        list of StrongNeuron
            The largest |R| first; one entry for each token at which a neuron is strong.

        Raises
        ------
        InvalidArgument
            If `k` is not a whole number from 1 on, the trace has no neurons, or the atlas is of
            another model or revision.
        """
        return neurons.strong(StrongNeuron, self, "neuron", k, atlas)

    def heads(self, k: int = 10, atlas: Labels | None = None) -> list[StrongHead]:
        """Return the strongest attention heads, as `neurons` does the neurons: site "head"."""
        return neurons.strong(StrongHead, self, "head", k, atlas)

    def to_pandas(self, site: str | None = None) -> pd.DataFrame:
        """Return the relevance at a site as a data frame with one row per value.

        Parameters
        ----------
        site : str, optional
            One of `sites`; default as in `relevance`.

        Returns
        -------
        pandas.DataFrame
            Columns "layer", "position", "token" and "feature", unless the reduction has summed
            over them, and "relevance".

        Raises
        ------
        MissingDependency
            If pandas is missing.
        """
        return top_entries.frame(self, self._site(site))

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as plain lists and numbers, ready for `json.dumps`.

        Values that are not finite, which JSON does not know, become None.
        """
        from reltrace.storage import trace_files as files

        return files.to_dict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace to a safetensors file that `Trace.load` reads.

        The file holds one tensor per site ("site/part" where a site has parts) and, as
        metadata, everything else. It replaces an older file in one step.
        """
        from reltrace.storage import trace_files as files

        return files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a file that `save` wrote.

        Raises
        ------
        InvalidArgument
            If the file is not one that `save` wrote.
        OSError
            If it can not be read.
        """
        from reltrace.storage import trace_files as files

        return files.load(Path(path))

    def _site(self, site: str | None) -> str:
        if not self.arrays:
            raise invalid("site", "is not there: no site was requested")
        if site is None:
            return "resid" if "resid" in self.arrays else self.sites[0]
        if site not in self.arrays:
            raise invalid("site", f"{site!r} was not requested; there are {', '.join(self.sites)}")
        return site

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows."""
        from reltrace.viz.notebook import trace_html

        return trace_html(self)

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{site}{f'/{part}' if part else ''} {list(array.shape)}"
            for site, parts in self.arrays.items()
            for part, array in parts.items()
        )
        name = "" if self.id is None else f"id={self.id!r}, "
        return (
            f"Trace({name}{len(self.tokens)} tokens, target {self.target.token!r} "
            f"({self.target.logit:.3f}), {shapes}, model {self.provenance.model!r})"
        )
