"""Relevance, reduced in a gradient hook the moment the gradient exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.reductions import REDUCTIONS, JobRows, Reduction, Sizes
from reltrace_worker.engine.sites import SITES, Site
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import SiteTensor


def relevance_of(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient times input, R = x * dL/dx, both cast to float32 before the product."""
    return value.float() * gradient.float()


@dataclass(frozen=True, slots=True)
class _Group:
    """What jobs of a batch must have in common to share the buffers of one site."""

    site: str
    reduction: str
    layers: tuple[int, ...]
    k: int
    # A job of many targets must not multiply the buffers of its neighbours.
    backward_passes: int

    @staticmethod
    def of(job: TraceJob, site: str, layers: int) -> _Group:
        wanted = job.layers or tuple(range(layers))
        wanted = wanted if SITES[site].per_layer else (0,)
        return _Group(site, job.reduction, wanted, job.k, len(job.targets))


@dataclass(slots=True)
class _Buffers:
    """The reduced relevance of one site, of the jobs of one group."""

    site: Site
    reduction: Reduction
    backward_passes: int
    # Index in the buffers of each layer that was asked for.
    layers: dict[int, int]
    # Rows of each job, by its index in the batch, among the rows of the group.
    jobs: dict[int, JobRows]
    sizes: Sizes
    # Rows of the group in the batch, on the device; None: all.
    rows: torch.Tensor | None
    # One per part of the reduction, on the CPU: [passes, layers asked for, *reduced layer].
    parts: tuple[torch.Tensor, ...]
    written: int = 0

    def record(
        self,
        target: int,
        layer: int,
        value: torch.Tensor,
        gradient: torch.Tensor,
        shape: ModelShape,
    ) -> None:
        if target >= self.backward_passes or layer not in self.layers:
            return
        if self.rows is not None:
            # A copy only where the layer is on another device than the embeddings.
            rows = self.rows.to(value.device)
            value, gradient = value[rows], gradient[rows]
        relevance = self.site.fold(relevance_of(value, gradient), shape)
        reduced = self.reduction.reduce(relevance, tuple(self.jobs.values()), self.sizes)
        for buffer, part in zip(self.parts, reduced, strict=True):
            buffer[target, self.layers[layer]].copy_(part, non_blocking=True)
        self.written += 1


class RelevanceRecorder(SiteHooks):
    """Collects what the jobs of one batch asked for while its backward passes run.

    Nothing of a tensor outlives the pass but its reduced relevance, in buffers on the CPU.
    """

    def __init__(self, loaded: LoadedModel, batch: PackedBatch) -> None:
        self._batch = batch
        self._shape = loaded.shape
        self._device = loaded.device
        self._devices = loaded.devices
        layers = len(loaded.family.decoder_layers(loaded.model))
        groups: dict[_Group, list[int]] = {}
        for index, job in enumerate(batch.jobs):
            for site in job.sites:
                groups.setdefault(_Group.of(job, site, layers), []).append(index)
        self._buffers: dict[str, list[_Buffers]] = {}
        for group, jobs in groups.items():
            self._buffers.setdefault(group.site, []).append(self._allocate(group, jobs))
        super().__init__(
            loaded,
            {
                site: frozenset(layer for buffers in of_site for layer in buffers.layers)
                for site, of_site in self._buffers.items()
            },
        )

    def _allocate(self, group: _Group, indices: list[int]) -> _Buffers:
        site, reduction = SITES[group.site], REDUCTIONS[group.reduction]
        packing = self._batch.packing
        jobs, start = {}, 0
        for position, job in enumerate(indices):
            stop = start + packing.lengths[job]
            jobs[job] = JobRows(position, start, stop)
            start = stop
        rows = None
        if len(indices) < len(self._batch.jobs):
            starts, lengths = packing.starts, packing.lengths
            rows = torch.cat([torch.arange(starts[j], starts[j] + lengths[j]) for j in indices])
            rows = rows.to(self._device)
        sizes = Sizes(start, len(indices), site.features(self._shape), group.k)
        parts = tuple(
            torch.empty(
                (group.backward_passes, len(group.layers), *reduction.shape(sizes)),
                dtype=dtype,
                # Pinned, a copy from the GPU does not stop the queue of kernels.
                pin_memory=self._device.type == "cuda",
            )
            for _, dtype in reduction.parts
        )
        layers = {layer: index for index, layer in enumerate(group.layers)}
        return _Buffers(site, reduction, group.backward_passes, layers, jobs, sizes, rows, parts)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        for buffers in self._buffers.get(site, ()):
            buffers.record(self.target, layer, value[0], gradient[0], self._shape)

    def finish(self) -> None:
        """Wait for the copies from the device, and check that every tensor has arrived."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for site, of_site in self._buffers.items():
            for buffers in of_site:
                expected = buffers.backward_passes * len(buffers.layers)
                if buffers.written != expected:
                    raise EngineError(
                        f"site {site!r} recorded {buffers.written} tensors instead of {expected}"
                    )

    def tensors(self, index: int) -> tuple[SiteTensor, ...]:
        """Return the tensors of the job with this index in the batch, trace by trace.

        Raises `EngineError`: relevance is not finite; names the site and the layer.
        """
        job = self._batch.jobs[index]
        tensors = []
        for trace in range(len(job.targets)):
            for site in job.sites:
                (buffers,) = (b for b in self._buffers[site] if index in b.jobs)
                for (part, _), buffer in zip(buffers.reduction.parts, buffers.parts, strict=True):
                    layers = buffers.reduction.select(
                        buffer[trace], buffers.jobs[index], buffers.sizes
                    )
                    _check_finite(buffers.site, layers, tuple(buffers.layers))
                    values = layers if buffers.site.per_layer else layers[0]
                    # A copy even of a whole buffer: pinned memory does not leave the engine.
                    values = values.clone(memory_format=torch.contiguous_format)
                    tensors.append(SiteTensor(trace, site, part, values))
        return tuple(tensors)


def _check_finite(site: Site, reduced: torch.Tensor, layers: tuple[int, ...]) -> None:
    finite = reduced.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        # Gradients flow from the last layer down: the highest layer at fault comes first.
        layer = max(layers[int(index)] for index in (~finite).nonzero())
        where = f" at layer {layer}" if site.per_layer else ""
        raise EngineError(
            f"the relevance of site {site.name!r} is not finite{where}: the model's weights or "
            "activations overflow, or are not finite themselves"
        )
