"""The strongest places of every neuron and head over many prompts, merged on the device.

For every feature of a site this keeps the k places (prompt, token) where its relevance, and where
its activation, is strongest, positive and negative apart; and of both their sum and a histogram.
(The idea of relevance maximization is that of Achtibat et al., "From attribution maps to
human-understandable explanations", 2023, and of zennit-crp; here for language.)

All of it is exact and does not depend on the order or on the packs in which prompts come: a list is
the k largest of a set of distinct integers, and sums and histograms are integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from reltrace_worker.engine.capture import relevance_of
from reltrace_worker.engine.pack import Pack
from reltrace_worker.engine.sites import SITES
from reltrace_worker.engine.watch import Watch
from reltrace_worker.errors import EngineError
from reltrace_worker.jobs import PreparedCorpus, PreparedJob, ResolvedTarget, SiteTensor
from reltrace_worker.model.loading import LoadedModel, ModelShape

ATLAS_SITES = ("neuron", "head")

LISTS = ("relevance+", "relevance-", "activation+", "activation-")
MEASURES = ("relevance", "activation")
SUMS = (*MEASURES, "relevance mass")
"""Mass is the size of the relevance, |R|, over all tokens."""

MOST_PROMPTS = 1 << 16
"""Of one slice: a place has 16 bits for its prompt, and 16 for its token."""

POINT = 40
"""Sums are kept in units of 2 to the power of minus this: about 1e-12."""

OCTAVES = range(-24, 8)
"""Histograms have one bin per octave of |x|, the first from 2**-24 to 2**-23."""

BINS = 2 * len(OCTAVES) + 1
"""Negative values, the largest first; what is smaller than 2**-24 either way; positive values."""

_LARGEST = 2.0**22
_ROWS = 512
"""Rows whose keys are made at a time: they need 8 bytes for each of four lists and feature."""

_BIAS, _MANTISSA = 127, 23
_LOW = (1 << 32) - 1


def keys_of(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return integers that are ordered as positive values, of equal ones the earliest place first.

    Parameters
    ----------
    values
        float32 [N, F].
    places
        int64 [N], less than 2**32, all different.

    Returns
    -------
    torch.Tensor
        int64 [N, F]: the value's bits above, the complement of the place below. Values that are not
        positive give 0.
    """
    # The bits of positive floats are ordered as the floats are.
    bits = values.view(torch.int32).long()
    keys = (bits << 32) | (_LOW - places)[:, None]
    return torch.where(values > 0, keys, keys.new_zeros(()))


def values_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the values of keys, float32; 0 where there is none."""
    return (keys >> 32).int().view(torch.float32)


def places_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the places of keys, int64; -1 where there is none."""
    return torch.where(keys > 0, _LOW - (keys & _LOW), keys.new_full((), -1))


def bins_of(values: torch.Tensor) -> torch.Tensor:
    """Return the bin of each value, int64, from its exponent."""
    bits = values.view(torch.int32)
    exponent = ((bits & 0x7FFFFFFF) >> _MANTISSA) - _BIAS
    step = (exponent - OCTAVES.start + 1).clamp(0, len(OCTAVES))
    return torch.where(bits < 0, len(OCTAVES) - step, len(OCTAVES) + step).long()


@dataclass(slots=True)
class SiteAtlas:
    """What is known of the features of one site.

    Parameters
    ----------
    strongest
        int64 [L, 4, k, F]: keys, in the order of ``LISTS``, the strongest first; 0: there is none.
    beside
        float32 of the same shape: the activation at places of relevance, and the relevance at those
        of activation; 0 where there is no place.
    high, low
        int64 [L, 3, F]: sums in the order of ``SUMS``, in units of 2**-``POINT``, are
        ``high * 2**32 + low``; ``low`` is less than 2**32.
    histogram
        int32 [L, 2, F, ``BINS``], in the order of ``MEASURES``.
    """

    strongest: torch.Tensor
    beside: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    histogram: torch.Tensor

    @classmethod
    def empty(cls, layers: int, features: int, k: int, device: torch.device) -> SiteAtlas:
        """Return the atlas of no prompt."""
        return cls(
            torch.zeros(layers, 4, k, features, dtype=torch.int64, device=device),
            torch.zeros(layers, 4, k, features, dtype=torch.float32, device=device),
            torch.zeros(layers, len(SUMS), features, dtype=torch.int64, device=device),
            torch.zeros(layers, len(SUMS), features, dtype=torch.int64, device=device),
            torch.zeros(layers, 2, features, BINS, dtype=torch.int32, device=device),
        )

    def add(
        self, layer: int, relevance: torch.Tensor, activation: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Add the rows of one layer.

        Parameters
        ----------
        relevance, activation
            float32 [N, F], finite.
        places
            int64 [N].
        """
        for start in range(0, len(places), _ROWS):
            rows = slice(start, start + _ROWS)
            at = places[rows]
            both = relevance[rows], activation[rows]
            for measure, values in enumerate(both):
                for sign, turned in enumerate((values, -values)):
                    keys = keys_of(turned.contiguous(), at)
                    self._keep(layer, 2 * measure + sign, keys, both[1 - measure])
                units = (values.double() * 2.0**POINT).round().long()
                self._sum(layer, measure, units)
                if measure == 0:
                    self._sum(layer, SUMS.index("relevance mass"), units.abs())
                self._count(self.histogram[layer, measure], values)

    def _keep(self, layer: int, which: int, keys: torch.Tensor, beside: torch.Tensor) -> None:
        kept, kept_beside = self.strongest[layer, which], self.beside[layer, which]
        top = torch.cat([kept, keys]).topk(len(kept), dim=0)
        found = torch.cat([kept_beside, beside]).gather(0, top.indices)
        # Of keys of 0 any may be taken; all others are different.
        kept_beside.copy_(torch.where(top.values > 0, found, found.new_zeros(())))
        kept.copy_(top.values)

    def _sum(self, layer: int, which: int, units: torch.Tensor) -> None:
        # In halves: together they would overflow after some million tokens.
        low = self.low[layer, which] + (units & _LOW).sum(0)
        self.high[layer, which] += (units >> 32).sum(0) + (low >> 32)
        self.low[layer, which] = low & _LOW

    def _count(self, histogram: torch.Tensor, values: torch.Tensor) -> None:
        features, bins = histogram.shape
        of_feature = torch.arange(features, device=values.device) * bins
        flat = (bins_of(values.contiguous()) + of_feature).flatten()
        histogram += torch.bincount(flat, minlength=features * bins).reshape(features, bins)


class AtlasCapture(Watch):
    """Adds the passes of one pack to the atlas of a slice.

    Parameters
    ----------
    loaded
        The model.
    pack
        The jobs, with one target each.
    numbers
        Of each job of the pack: its prompt's number in the slice.
    atlas
        By site; changed in place.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pack: Pack,
        numbers: Sequence[int],
        atlas: dict[str, SiteAtlas],
    ) -> None:
        layers = frozenset(range(loaded.shape.layers))
        super().__init__(loaded, dict.fromkeys(atlas, layers))
        self._shape: ModelShape = loaded.shape
        self._atlas = atlas
        self._places = torch.cat(
            [
                (number << 16) + torch.arange(len(job.token_ids))
                for number, job in zip(numbers, pack.jobs, strict=True)
            ]
        ).to(loaded.device)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one tensor of the running backward pass."""
        if site not in self._atlas:
            return
        here = SITES[site]
        relevance = here.fold(relevance_of(value[0], gradient[0]), self._shape)
        activation = value[0].float()
        if site == "head":
            # What a head writes is a vector: how strong it is, its length says.
            activation = activation.reshape(*relevance.shape, -1).norm(dim=-1)
        for name, found in (("relevance", relevance), ("activation", activation)):
            if not bool(((found.abs() < _LARGEST) & found.isfinite()).all()):
                raise EngineError(
                    f"the {name} of site {site!r} at layer {layer} is not finite, or too large "
                    f"for an atlas ({_LARGEST:.0f})"
                )
        self._atlas[site].add(layer, relevance, activation, self._places.to(value.device))


PASS_TOKENS = 2048
"""Tokens of one pass, whatever the worker's memory: numbers depend on what is packed together, in
their last bits, and an atlas is to be the same wherever it is made."""


class Slice:
    """The atlas of a corpus that is being made, pass by pass.

    Parameters
    ----------
    loaded
        The model.
    corpus
        The prompts.

    Attributes
    ----------
    atlas
        By site: of the passes so far.
    targets
        By number of the prompt: what is explained of it.
    """

    def __init__(self, loaded: LoadedModel, corpus: PreparedCorpus) -> None:
        self.corpus = corpus
        shape = loaded.shape
        self.atlas = {
            site: SiteAtlas.empty(
                shape.layers, SITES[site].features(shape), corpus.k, loaded.device
            )
            for site in ATLAS_SITES
        }
        self.targets: dict[int, ResolvedTarget] = {}
        self._left = _passes(corpus.prompts)

    @property
    def over(self) -> bool:
        """All prompts are in it."""
        return not self._left

    def drop(self, _: int = 0) -> None:
        """Go on no more: nobody waits for it."""
        self._left.clear()

    def take(self) -> list[int]:
        """Return the places in the corpus of the prompts of the next pass."""
        return self._left.popleft()

    def tensors(self) -> tuple[SiteTensor, ...]:
        """Return the atlas: of each site what `SiteAtlas` has; and the corpus.

        Site ``corpus`` has ``token_ids``, int32 [T], the prompts' tokens one after another,
        ``lengths``, int32 [P], 0 where a prompt was left out, and ``targets``, int32 [P], the token
        that is explained, -1 where the prompt was left out.
        """
        found = [
            SiteTensor(0, site, part.name, getattr(atlas, part.name).cpu())
            for site, atlas in self.atlas.items()
            for part in fields(SiteAtlas)
        ]
        corpus = self.corpus
        lengths = torch.zeros(len(corpus.numbers) + len(corpus.skipped), dtype=torch.int32)
        targets = torch.full_like(lengths, -1)
        for number, job in zip(corpus.numbers, corpus.prompts, strict=True):
            lengths[number] = len(job.token_ids)
            targets[number] = self.targets[number].token_id
        ids = [token for job in corpus.prompts for token in job.token_ids]
        return (
            *found,
            SiteTensor(0, "corpus", "token_ids", torch.tensor(ids, dtype=torch.int32)),
            SiteTensor(0, "corpus", "lengths", lengths),
            SiteTensor(0, "corpus", "targets", targets),
        )


def _passes(prompts: Sequence[PreparedJob]) -> deque[list[int]]:
    """Cut a corpus into passes, in its order."""
    passes: deque[list[int]] = deque()
    tokens = 0
    for index, job in enumerate(prompts):
        if not passes or tokens + len(job.token_ids) > PASS_TOKENS:
            passes.append([])
            tokens = 0
        passes[-1].append(index)
        tokens += len(job.token_ids)
    return passes
