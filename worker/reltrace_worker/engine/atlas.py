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

CLASSES = 1 << 9
"""Signs and exponents of float32: what is counted first, since there they stand as they are."""

_LARGEST = 2.0**22
_ROWS = 2048
"""Rows that are merged at a time: they need some 30 bytes for each feature."""

_BLOCK = 16
"""Rows of which the largest value is looked up first: most are smaller than what is kept."""

_COARSE = 8

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


def classes_of(values: torch.Tensor) -> torch.Tensor:
    """Return the sign bit and the exponent of each value, int32 from 0 to ``CLASSES`` - 1."""
    return (values.view(torch.int32) >> _MANTISSA).bitwise_and_(CLASSES - 1)


def bins_of(classes: torch.Tensor) -> torch.Tensor:
    """Return the bin of the values of each class, int32."""
    exponent = (classes & (CLASSES // 2 - 1)) - _BIAS
    step = (exponent - OCTAVES.start + 1).clamp(0, len(OCTAVES))
    return len(OCTAVES) + torch.where(classes < CLASSES // 2, step, -step)


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
            # Features first: what is looked for of one feature stands together.
            both = torch.stack((relevance[rows].T, activation[rows].T))
            for measure in range(len(MEASURES)):
                self._keep(layer, measure, both, places[rows])
                self._count(self.histogram[layer, measure], both[measure])
            for which, values in enumerate((*both, both[0].abs())):
                self._sum(layer, which, values)

    def _keep(self, layer: int, measure: int, both: torch.Tensor, places: torch.Tensor) -> None:
        """Merge both lists of a measure with its values, [F, N], in ``both[measure]``."""
        lists = slice(2 * measure, 2 * measure + 2)
        values = both[measure]
        features = len(values)
        kept = self.strongest[layer, lists]
        k = kept.shape[1]
        candidates = _candidates(values, kept, places)
        rows, columns = candidates.flatten(0, 1).nonzero().unbind(1)
        if not len(rows):
            return
        counts = candidates.sum(-1).flatten()
        # Of each candidate: how many of its list stand before it.
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = values[rows % features, columns].abs()
        keys = kept.new_zeros(2 * features, k + int(counts.max()))
        beside = self.beside.new_zeros(keys.shape)
        keys[:, :k] = kept.transpose(1, 2).reshape(-1, k)
        beside[:, :k] = self.beside[layer, lists].transpose(1, 2).reshape(-1, k)
        keys[rows, k + rank] = keys_of(found[:, None], places[columns])[:, 0]
        beside[rows, k + rank] = both[1 - measure][rows % features, columns]
        # All keys but those of 0, behind which nothing is beside, are different. Few as they are of
        # one list, sorting them all takes a GPU less time than looking for the largest.
        ordered, order = keys.sort(dim=1, descending=True)
        kept.copy_(ordered[:, :k].view(2, features, k).transpose(1, 2))
        chosen = beside.gather(1, order[:, :k]).view(2, features, k)
        self.beside[layer, lists] = chosen.transpose(1, 2)

    def _sum(self, layer: int, which: int, values: torch.Tensor) -> None:
        # In two parts of 2**-8 and of 2**-POINT, each exact in float32 and in the sum of float64.
        fine = values * 2.0**_COARSE
        coarse = fine.round()
        fine = fine.sub_(coarse).mul_(2.0 ** (POINT - _COARSE)).round_()
        low = self.low[layer, which] + fine.sum(-1, dtype=torch.float64).long()
        self.high[layer, which] += coarse.sum(-1, dtype=torch.float64).long() + (low >> 32)
        self.low[layer, which] = low & _LOW

    def _count(self, histogram: torch.Tensor, values: torch.Tensor) -> None:
        features = len(values)
        of_feature = torch.arange(0, features * CLASSES, CLASSES, device=values.device)
        flat = (classes_of(values) + of_feature[:, None].int()).flatten()
        found = torch.bincount(flat, minlength=features * CLASSES).view(features, CLASSES)
        bins = bins_of(torch.arange(CLASSES, dtype=torch.int32, device=values.device))
        histogram.index_add_(1, bins, found.int())


def _candidates(values: torch.Tensor, kept: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return which values may be among the k strongest: all that are, and few others.

    Parameters
    ----------
    values
        float32 [F, N].
    kept
        int64 [2, k, F]: the keys that are kept so far, of positive and of negative values.
    places
        int64 [N].

    Returns
    -------
    torch.Tensor
        bool [2, F, N], for positive and for negative values.
    """
    weakest = kept[:, -1]
    bound = values_of(weakest)
    # Of equal values the earlier place is kept: here, mostly the one that is.
    stays = places_of(weakest) < places.min()
    bound = torch.where(stays, bound.nextafter(bound.new_full((), torch.inf)), bound)
    k, blocks = kept.shape[1], values.shape[-1] // _BLOCK
    if blocks >= k:
        # k blocks have a value that large, so the k-th largest of all is not smaller.
        by_block = values[:, : blocks * _BLOCK].reshape(-1, blocks, _BLOCK)
        largest = torch.stack((by_block.amax(-1), -by_block.amin(-1)))
        bound = bound.maximum(largest.topk(k, dim=-1).values[..., -1])
    positive, negative = bound[..., None]
    return torch.stack((values >= positive, values <= -negative))


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
            # Not so where one is NaN, too.
            if not float(found.abs().amax()) < _LARGEST:
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
