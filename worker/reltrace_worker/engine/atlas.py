"""The atlas of a corpus: passes over its prompts, whose neurons and heads are merged on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import fields

import torch

from reltrace_worker.engine.capture import relevance_of
from reltrace_worker.engine.pack import Pack
from reltrace_worker.engine.site_atlas import SiteAtlas
from reltrace_worker.engine.sites import SITES
from reltrace_worker.engine.watch import Watch
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import AtlasJob, TraceJob
from reltrace_worker.types.results import ResolvedTarget, SiteTensor

ATLAS_SITES = ("neuron", "head")

_LARGEST = 2.0**22
"""Sums are exact up to here, and far beyond what a model's numbers are."""


class AtlasCapture(Watch):
    """Adds the passes of one pack to the atlas of a slice.

    Parameters
    ----------
    loaded
        The model.
    pack
        The jobs, with one target each.
    corpus
        What they are of.
    numbers
        Of each job of the pack: its prompt's number in the slice.
    atlas
        By site; changed in place.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pack: Pack,
        corpus: AtlasJob,
        numbers: Sequence[int],
        atlas: dict[str, SiteAtlas],
    ) -> None:
        layers = frozenset(range(loaded.shape.layers))
        super().__init__(loaded, dict.fromkeys(atlas, layers))
        self._shape: ModelShape = loaded.shape
        self._atlas = atlas
        rows, places = [], []
        starts = pack.packing.starts
        for number, start, job in zip(numbers, starts, pack.jobs, strict=True):
            counted = torch.tensor(corpus.counted_positions(job.token_ids), dtype=torch.int64)
            rows.append(start + counted)
            places.append((number << 16) + counted)
        self._rows = torch.cat(rows).to(loaded.device)
        self._places = torch.cat(places).to(loaded.device)

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
        rows, places = (array.to(value.device) for array in (self._rows, self._places))
        self._atlas[site].add(layer, relevance, activation, rows, places)


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
    checkpointing
        A pass recomputed its layers.
    dropped
        Nobody waits for it.
    """

    @staticmethod
    def size(shape: ModelShape, k: int) -> int:
        """Return the bytes of an atlas of a model."""
        sites = (SITES[site].features(shape) for site in ATLAS_SITES)
        return sum(SiteAtlas.size(shape.layers, features, k) for features in sites)

    def __init__(self, loaded: LoadedModel, corpus: AtlasJob) -> None:
        self.corpus = corpus
        shape = loaded.shape
        self.atlas = {
            site: SiteAtlas.empty(
                shape.layers, SITES[site].features(shape), corpus.k, loaded.device
            )
            for site in ATLAS_SITES
        }
        self.targets: dict[int, ResolvedTarget] = {}
        self.checkpointing = False
        self.dropped = False
        self._left = _passes(corpus.prompts)

    @property
    def over(self) -> bool:
        """All prompts are in it, or nobody waits for it."""
        return not self._left

    def drop(self, _: int = 0) -> None:
        """Go on no more: nobody waits for it."""
        self.dropped = True
        self._left.clear()

    def take(self) -> list[int]:
        """Return the places in the corpus of the prompts of the next pass; none after the last."""
        try:
            return self._left.popleft()
        except IndexError:
            # It was dropped at this moment.
            return []

    def tensors(self) -> tuple[SiteTensor, ...]:
        """Return the atlas: of each site what `SiteAtlas` has; and the corpus.

        Site ``corpus`` has ``token_ids``, int32 [T], the prompts' tokens one after another, and
        ``lengths``, int32 [P], 0 where a prompt was left out. Where prompts do not explain their
        own next tokens it has ``targets`` too, int32 [P]: the token that is explained, -1 where the
        prompt was left out.
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
        found += [
            SiteTensor(0, "corpus", "token_ids", torch.tensor(ids, dtype=torch.int32)),
            SiteTensor(0, "corpus", "lengths", lengths),
        ]
        if not corpus.next_tokens:
            found.append(SiteTensor(0, "corpus", "targets", targets))
        return tuple(found)


def _passes(prompts: Sequence[TraceJob]) -> deque[list[int]]:
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
