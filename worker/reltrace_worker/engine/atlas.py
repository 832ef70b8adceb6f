"""The atlas of a corpus: passes over its prompts, whose neurons and heads are merged on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import fields

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.recorder import relevance_of
from reltrace_worker.engine.site_atlas import SiteAtlas
from reltrace_worker.engine.sites import SITES
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import AtlasJob, TraceJob
from reltrace_worker.types.results import JobResult, Outcome, ResolvedTarget, SiteTensor

ATLAS_SITES = ("neuron", "head")

_LARGEST = 2.0**22
"""Sums are exact up to here, and far beyond what a model's numbers are."""

PASS_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of one pass, whatever the worker's memory and speed: numbers depend on what is packed
together, in their last bits, and an atlas is to be the same on all devices of a kind."""


class AtlasRecorder(SiteHooks):
    """Adds the passes of one batch to an atlas; `numbers` are those of its prompts."""

    def __init__(
        self, loaded: LoadedModel, batch: PackedBatch, atlas: Atlas, numbers: Sequence[int]
    ) -> None:
        layers = frozenset(range(loaded.shape.layers))
        super().__init__(loaded, dict.fromkeys(atlas.sites, layers))
        self._shape = loaded.shape
        self._sites = atlas.sites
        rows, places = [], []
        for number, start, job in zip(numbers, batch.packing.starts, batch.jobs, strict=True):
            counted = torch.tensor(atlas.job.counted_positions(job.token_ids), dtype=torch.int64)
            rows.append(start + counted)
            places.append((number << 16) + counted)
        self._rows = torch.cat(rows).to(loaded.device)
        self._places = torch.cat(places).to(loaded.device)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        if site not in self._sites:
            return
        relevance = SITES[site].fold(relevance_of(value[0], gradient[0]), self._shape)
        activation = value[0].float()
        if site == "head":
            # A head writes a vector: its length is its activation.
            activation = activation.reshape(*relevance.shape, -1).norm(dim=-1)
        for name, values in (("relevance", relevance), ("activation", activation)):
            # Written so that NaN fails, too.
            if not float(values.abs().amax()) < _LARGEST:
                raise EngineError(
                    f"the {name} of site {site!r} at layer {layer} is not finite, or too large "
                    f"for an atlas ({_LARGEST:.0f})"
                )
        rows, places = (array.to(value.device) for array in (self._rows, self._places))
        self._sites[site].add(layer, relevance, activation, rows, places)


class Atlas:
    """The atlas of a corpus that is being made, pass by pass."""

    @staticmethod
    def table_bytes(shape: ModelShape, k: int) -> int:
        features = (SITES[site].features(shape) for site in ATLAS_SITES)
        return sum(SiteAtlas.size(shape.layers, count, k) for count in features)

    @staticmethod
    def result_bytes(job: AtlasJob, shape: ModelShape) -> int:
        """Return the bytes of `tensors`: the tables, and the corpus in int32."""
        prompts = len(job.numbers) + len(job.skipped)
        corpus = job.total_tokens + prompts * (1 if job.next_tokens else 2)
        return Atlas.table_bytes(shape, job.k) + corpus * torch.int32.itemsize

    def __init__(self, loaded: LoadedModel, job: AtlasJob) -> None:
        self.job = job
        shape = loaded.shape
        self.sites = {
            site: SiteAtlas.empty(shape.layers, SITES[site].features(shape), job.k, loaded.device)
            for site in ATLAS_SITES
        }
        # What is traced of each prompt, by its number.
        self.targets: dict[int, ResolvedTarget] = {}
        # A pass recomputed its layers.
        self.checkpointing = False
        self._cancelled = False
        self._computed = 0
        self._passes = _passes(job.prompts, PASS_TOKENS[loaded.device.type])

    @property
    def finished(self) -> bool:
        """All prompts are in it, or it was cancelled."""
        return not self._passes

    def cancel(self, _: int = 0) -> None:
        self._cancelled = True
        self._passes.clear()

    def next_pass(self) -> list[int]:
        """Return the indices of the prompts of the next pass; none after the last."""
        try:
            chosen = self._passes.popleft()
        except IndexError:
            # It was cancelled at this moment, on another thread.
            return []
        self._computed += sum(self.job.prompts[index].total_tokens for index in chosen)
        return chosen

    def take_work(self) -> dict[int, int]:
        """Return how many tokens went through the model since the last call, of its one job."""
        work, self._computed = {0: self._computed}, 0
        return work

    def take_outcomes(self) -> dict[int, Outcome]:
        """Return the result, once it is finished; its targets are each token once."""
        if self._cancelled or not self.finished:
            return {}
        targets = {target.token_id: target for target in self.targets.values()}
        return {0: JobResult(tuple(targets.values()), self.tensors(), self.checkpointing)}

    def tensors(self) -> tuple[SiteTensor, ...]:
        """Return the parts of each `SiteAtlas`, and the corpus.

        Site ``corpus`` has ``token_ids``, int32 [T], the prompts' tokens one after another, and
        ``lengths``, int32 [P], 0 where a prompt was left out. Where prompts do not trace their
        own next tokens it has ``targets`` too, int32 [P]: the token that is traced, -1 where the
        prompt was left out.
        """
        tensors = [
            SiteTensor(0, site, part.name, getattr(atlas, part.name).cpu())
            for site, atlas in self.sites.items()
            for part in fields(SiteAtlas)
        ]
        job = self.job
        lengths = torch.zeros(len(job.numbers) + len(job.skipped), dtype=torch.int32)
        targets = torch.full_like(lengths, -1)
        for number, prompt in zip(job.numbers, job.prompts, strict=True):
            lengths[number] = len(prompt.token_ids)
            targets[number] = self.targets[number].token_id
        ids = [token for prompt in job.prompts for token in prompt.token_ids]
        tensors += [
            SiteTensor(0, "corpus", "token_ids", torch.tensor(ids, dtype=torch.int32)),
            SiteTensor(0, "corpus", "lengths", lengths),
        ]
        if not job.next_tokens:
            tensors.append(SiteTensor(0, "corpus", "targets", targets))
        return tuple(tensors)


def _passes(prompts: Sequence[TraceJob], most: int) -> deque[list[int]]:
    """Cut a corpus into passes of at most so many tokens, in its order."""
    passes: deque[list[int]] = deque()
    tokens = 0
    for index, job in enumerate(prompts):
        if not passes or tokens + len(job.token_ids) > most:
            passes.append([])
            tokens = 0
        passes[-1].append(index)
        tokens += len(job.token_ids)
    return passes
