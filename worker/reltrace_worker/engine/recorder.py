"""Relevance, reduced in a gradient hook the moment the gradient exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.reductions import REDUCTIONS, JobRows, Reduction, Sizes
from reltrace_worker.engine.sites import SITES, Site
from reltrace_worker.lrp.ops import elementwise
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.placement import to_device
from reltrace_worker.types.errors import EngineError, NotFiniteError
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import SiteTensor


def relevance_of(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient times input, R = x * dL/dx, both cast to float32 before the product."""
    return value.float() * gradient.float()


@elementwise
def row_relevance(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum of `relevance_of` over the last dimension."""
    return relevance_of(value, gradient).sum(-1)


@dataclass(frozen=True, slots=True)
class _Group:
    """What jobs of a batch must have in common to share the buffers of one site."""

    site: Site
    reduction: Reduction
    layers: tuple[int, ...]
    k: int

    @staticmethod
    def of(job: TraceJob, site: Site, layers: int) -> _Group:
        wanted = (job.layers or tuple(range(layers))) if site.per_layer else (0,)
        return _Group(site, REDUCTIONS[job.reduction], wanted, job.k)


class _Buffers:
    """The reduced relevance of one site, of the jobs of one group, by their index in the batch."""

    def __init__(
        self, loaded: LoadedModel, batch: PackedBatch, group: _Group, indices: Sequence[int]
    ) -> None:
        self.group = group
        self._shape = loaded.shape
        self._written = 0
        # Index in the buffers of each layer that was asked for.
        self._layers = {layer: index for index, layer in enumerate(group.layers)}
        # Rows of each job among the rows of the group.
        self.jobs: dict[int, JobRows] = {}
        starts, lengths = batch.packing.starts, batch.packing.lengths
        start = 0
        for position, job in enumerate(indices):
            self.jobs[job] = JobRows(position, start, start + lengths[job])
            start += lengths[job]
        # Rows of the group in the batch, on the device; None: all.
        self._rows: torch.Tensor | None = None
        if len(indices) < len(batch.jobs):
            rows = [torch.arange(starts[j], starts[j] + lengths[j]) for j in indices]
            self._rows = to_device(torch.cat(rows), loaded.device)
        self._sizes = Sizes(start, len(indices), group.site.features(loaded.shape), group.k)
        self._reduce = group.reduction.prepare(
            tuple(self.jobs.values()), self._sizes, loaded.device
        )
        # One per part of the reduction, on the CPU: [passes, layers asked for, *reduced layer].
        self._parts = [
            torch.empty(
                (batch.backward_passes, len(group.layers), *group.reduction.shape(self._sizes)),
                dtype=dtype,
                # Pinned, a copy from the GPU does not stop the queue of kernels.
                pin_memory=loaded.device.type == "cuda",
            )
            for _, dtype in group.reduction.parts
        ]

    def record(self, target: int, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        if layer not in self._layers:
            return
        if self._rows is not None:
            value, gradient = value[self._rows], gradient[self._rows]
        if self.group.reduction.by_row:
            relevance = row_relevance(value, gradient)
        else:
            relevance = self.group.site.fold(relevance_of(value, gradient), self._shape)
        reduced = self._reduce(relevance)
        for buffer, part in zip(self._parts, reduced, strict=True):
            buffer[target, self._layers[layer]].copy_(part, non_blocking=True)
        self._written += 1

    def check_complete(self, passes: int) -> None:
        expected = passes * len(self._layers)
        if self._written != expected:
            raise EngineError(
                f"site {self.group.site.name!r} recorded {self._written} tensors instead of "
                f"{expected}"
            )

    def tensors(self, trace: int, job: int) -> list[SiteTensor]:
        """Return the parts of one trace of a job. Raises `NotFiniteError`."""
        site, reduction = self.group.site, self.group.reduction
        tensors = []
        for (part, _), buffer in zip(reduction.parts, self._parts, strict=True):
            layers = reduction.select(buffer[trace], self.jobs[job], self._sizes)
            _check_finite(site, layers, self.group.layers)
            values = layers if site.per_layer else layers[0]
            # A copy even of a whole buffer: pinned memory does not leave the engine.
            values = values.clone(memory_format=torch.contiguous_format)
            tensors.append(SiteTensor(trace, site.name, part, values))
        return tensors


class RelevanceRecorder(SiteHooks):
    """Collects what the jobs of one batch asked for while its backward passes run.

    Nothing of a tensor outlives the pass but its reduced relevance, in buffers on the CPU.
    """

    def __init__(self, loaded: LoadedModel, batch: PackedBatch) -> None:
        self._batch = batch
        self._device = loaded.device
        groups: dict[_Group, list[int]] = {}
        for index, job in enumerate(batch.jobs):
            for site in job.sites:
                group = _Group.of(job, SITES[site], loaded.shape.layers)
                groups.setdefault(group, []).append(index)
        self._buffers: dict[str, list[_Buffers]] = {}
        layers: dict[str, frozenset[int]] = {}
        for group, jobs in groups.items():
            site = group.site.name
            self._buffers.setdefault(site, []).append(_Buffers(loaded, batch, group, jobs))
            layers[site] = layers.get(site, frozenset()) | frozenset(group.layers)
        super().__init__(loaded, layers)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        for buffers in self._buffers.get(site, ()):
            buffers.record(self.target, layer, value[0], gradient[0])

    def finish(self) -> None:
        """Wait for the copies from the device, and check that every tensor has arrived."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for of_site in self._buffers.values():
            for buffers in of_site:
                buffers.check_complete(self.target + 1)

    def tensors(self, index: int) -> tuple[SiteTensor, ...]:
        """Return the tensors of the job with this index in the batch, of each trace that was made.

        Raises `NotFiniteError`, which names the site and the layer.
        """
        job = self._batch.jobs[index]
        tensors: list[SiteTensor] = []
        for trace in range(self.target + 1):
            for site in job.sites:
                (buffers,) = (b for b in self._buffers[site] if index in b.jobs)
                tensors += buffers.tensors(trace, index)
        return tuple(tensors)


def _check_finite(site: Site, reduced: torch.Tensor, layers: tuple[int, ...]) -> None:
    finite = reduced.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        # Gradients flow from the last layer down: the highest layer at fault comes first.
        layer = max(layers[int(index)] for index in (~finite).nonzero())
        where = f" at layer {layer}" if site.per_layer else ""
        raise NotFiniteError(
            f"the relevance of site {site.name!r} is not finite{where}: the model's weights or "
            "activations overflow, or are not finite themselves"
        )
