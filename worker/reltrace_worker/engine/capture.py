"""Relevance, reduced in a gradient hook the moment the gradient exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reltrace_worker.engine.pack import Pack
from reltrace_worker.engine.reductions import REDUCTIONS, Extent, Reduction, Span
from reltrace_worker.engine.sites import SITES, Site
from reltrace_worker.engine.watch import Watch
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import SiteTensor


def relevance_of(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient times input, R = x * dL/dx, both cast to float32 before the product."""
    return value.float() * gradient.float()


@dataclass(frozen=True, slots=True)
class _Wish:
    """What several jobs of a pack have in common: they share a recorder."""

    site: str
    reduction: str
    layers: tuple[int, ...]
    k: int
    passes: int
    """Else a job of many targets would multiply the room that its neighbours take."""

    @staticmethod
    def of(job: TraceJob, site: str, layers: int) -> _Wish:
        """Return what `job` asks of `site` in a model of so many layers."""
        wanted = job.layers or tuple(range(layers))
        wanted = wanted if SITES[site].per_layer else (0,)
        return _Wish(site, job.reduction, wanted, job.k, len(job.targets))


@dataclass(slots=True)
class _Recorder:
    """The jobs of a pack that want the same of one site.

    Parameters
    ----------
    site, reduction
        What the jobs asked for.
    places
        Place in the buffers of each layer that they asked for.
    spans
        Of those jobs, by their index in the pack; counted in the recorded rows.
    extent
        The sizes of what is reduced.
    rows
        Their packed rows on the device; None: all rows of the pack.
    passes
        Backward passes: the targets that each of them has.
    buffers
        One per part of the reduction, on the CPU: [passes, layers asked for, *reduced layer].
    """

    site: Site
    reduction: Reduction
    places: dict[int, int]
    spans: dict[int, Span]
    extent: Extent
    rows: torch.Tensor | None
    passes: int
    buffers: tuple[torch.Tensor, ...]
    written: int = 0

    def record(
        self,
        target: int,
        layer: int,
        value: torch.Tensor,
        gradient: torch.Tensor,
        shape: ModelShape,
    ) -> None:
        if target >= self.passes or layer not in self.places:
            return
        if self.rows is not None:
            # A copy only where the layer is on another device than the embeddings.
            rows = self.rows.to(value.device)
            value, gradient = value[rows], gradient[rows]
        folded = self.site.fold(relevance_of(value, gradient), shape)
        reduced = self.reduction.reduce(folded, tuple(self.spans.values()), self.extent)
        for buffer, part in zip(self.buffers, reduced, strict=True):
            buffer[target, self.places[layer]].copy_(part, non_blocking=True)
        self.written += 1


class Capture(Watch):
    """Collects what the jobs of one pack asked for while its backward passes run.

    Nothing of a tensor outlives the pass but its reduced relevance, in buffers on the CPU.

    Parameters
    ----------
    loaded
        The model.
    pack
        The jobs.
    """

    def __init__(self, loaded: LoadedModel, pack: Pack) -> None:
        self._pack = pack
        self._shape = loaded.shape
        self._device = loaded.device
        self._devices = loaded.devices
        layers = len(loaded.family.decoder_layers(loaded.model))
        wishes: dict[_Wish, list[int]] = {}
        for index, job in enumerate(pack.jobs):
            for site in job.sites:
                wishes.setdefault(_Wish.of(job, site, layers), []).append(index)
        self._recorders: dict[str, list[_Recorder]] = {}
        for wish, jobs in wishes.items():
            self._recorders.setdefault(wish.site, []).append(self._recorder(wish, jobs))
        super().__init__(
            loaded,
            {
                name: frozenset(layer for recorder in recorders for layer in recorder.places)
                for name, recorders in self._recorders.items()
            },
        )

    def _recorder(self, wish: _Wish, jobs: list[int]) -> _Recorder:
        site, reduction = SITES[wish.site], REDUCTIONS[wish.reduction]
        pack, spans, start = self._pack, {}, 0
        for place, job in enumerate(jobs):
            stop = start + pack.packing.lengths[job]
            spans[job] = Span(place, start, stop)
            start = stop
        rows = None
        if len(jobs) < len(pack.jobs):
            starts, lengths = pack.packing.starts, pack.packing.lengths
            rows = torch.cat([torch.arange(starts[j], starts[j] + lengths[j]) for j in jobs])
            rows = rows.to(self._device)
        extent = Extent(start, len(jobs), site.features(self._shape), wish.k)
        buffers = tuple(
            torch.empty(
                (wish.passes, len(wish.layers), *reduction.shape(extent)),
                dtype=dtype,
                # Pinned, a copy from the GPU does not stop the queue of kernels.
                pin_memory=self._device.type == "cuda",
            )
            for _, dtype in reduction.parts
        )
        places = {layer: place for place, layer in enumerate(wish.layers)}
        return _Recorder(site, reduction, places, spans, extent, rows, wish.passes, buffers)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Reduce the relevance of one tensor in the running backward pass."""
        for recorder in self._recorders.get(site, ()):
            recorder.record(self.target, layer, value[0], gradient[0], self._shape)

    def finish(self) -> None:
        """Wait for the copies from the device, and check that every tensor has arrived.

        Raises
        ------
        EngineError
            A hook did not fire, or fired too often.
        """
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for name, recorders in self._recorders.items():
            for recorder in recorders:
                expected = recorder.passes * len(recorder.places)
                if recorder.written != expected:
                    raise EngineError(
                        f"site {name!r} recorded {recorder.written} tensors instead of {expected}"
                    )

    def tensors(self, job: int) -> tuple[SiteTensor, ...]:
        """Return one job's tensors: for each trace, one per site in the order of the job.

        Parameters
        ----------
        job
            Index in the pack.

        Raises
        ------
        EngineError
            Relevance is not finite; names the site and the layer.
        """
        spec = self._pack.jobs[job]
        tensors = []
        for trace in range(len(spec.targets)):
            for site in spec.sites:
                (recorder,) = (r for r in self._recorders[site] if job in r.spans)
                for (part, _), buffer in zip(
                    recorder.reduction.parts, recorder.buffers, strict=True
                ):
                    layers = recorder.reduction.select(
                        buffer[trace], recorder.spans[job], recorder.extent
                    )
                    _check_finite(site, layers, tuple(recorder.places))
                    values = layers if recorder.site.per_layer else layers[0]
                    # A copy even of a whole buffer: pinned memory does not leave the engine.
                    values = values.clone(memory_format=torch.contiguous_format)
                    tensors.append(SiteTensor(trace, site, part, values))
        return tuple(tensors)


def _check_finite(site: str, reduced: torch.Tensor, layers: tuple[int, ...]) -> None:
    finite = reduced.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        # Gradients flow from the last layer down: the highest layer at fault comes first.
        layer = max(layers[int(place)] for place in (~finite).nonzero())
        where = f" at layer {layer}" if SITES[site].per_layer else ""
        raise EngineError(
            f"the relevance of site {site!r} is not finite{where}: the model's weights or "
            "activations overflow, or are not finite themselves"
        )
