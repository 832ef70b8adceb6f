"""Relevance, reduced in a gradient hook the moment the gradient exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from reltrace_worker.engine.pack import Pack
from reltrace_worker.engine.reductions import REDUCTIONS, Reduction, Span
from reltrace_worker.engine.sites import SITES, Side, Site, Tap
from reltrace_worker.errors import EngineError
from reltrace_worker.jobs import SiteTensor
from reltrace_worker.model.loading import LoadedModel


def relevance_of(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient times input, R = x * dL/dx, both cast to float32 before the product."""
    return value.float() * gradient.float()


@dataclass(slots=True)
class _Recorder:
    """The jobs of a pack that share a site and a reduction.

    Parameters
    ----------
    site, reduction
        What the jobs asked for.
    spans
        Of those jobs, by their index in the pack; counted in the recorded rows.
    rows
        Their packed rows on the device; None: all rows of the pack.
    passes
        Backward passes in which one of them has a target.
    buffer
        float32 on the CPU: [passes, layers, *reduced layer].
    """

    site: Site
    reduction: Reduction
    spans: dict[int, Span]
    rows: torch.Tensor | None
    passes: int
    buffer: torch.Tensor
    written: int = 0


class Capture:
    """Collects what the jobs of one pack asked for while its backward passes run.

    Nothing of a tensor outlives the pass but its reduced relevance, in buffers on the CPU.
    Set `target` before each backward pass.

    Parameters
    ----------
    loaded
        The model.
    pack
        The jobs.

    Attributes
    ----------
    target
        Index of the running backward pass: of the target, in each job.
    """

    def __init__(self, loaded: LoadedModel, pack: Pack) -> None:
        self.target = 0
        self._pack = pack
        self._shape = loaded.shape
        self._device = loaded.device
        self._devices = loaded.devices
        self._layers = loaded.family.decoder_layers(loaded.model)
        wanted: dict[tuple[str, str], list[int]] = {}
        for index, job in enumerate(pack.jobs):
            for site in job.sites:
                wanted.setdefault((site, job.reduction), []).append(index)
        self._recorders: dict[str, list[_Recorder]] = {}
        for (site, reduction), jobs in wanted.items():
            recorder = self._recorder(SITES[site], REDUCTIONS[reduction], jobs)
            self._recorders.setdefault(site, []).append(recorder)
        self._taps: list[tuple[Site, Tap]] = [
            (SITES[name], tap(loaded.family))
            for name in self._recorders
            if (tap := SITES[name].tap) is not None
        ]

    def _recorder(self, site: Site, reduction: Reduction, jobs: list[int]) -> _Recorder:
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
        passes = max(len(pack.jobs[job].targets) for job in jobs)
        layers = len(self._layers) if site.per_layer else 1
        reduced = reduction.shape(start, len(jobs), site.features(self._shape))
        buffer = torch.empty(
            (passes, layers, *reduced),
            dtype=torch.float32,
            # Pinned, a copy from the GPU does not stop the queue of kernels.
            pin_memory=self._device.type == "cuda",
        )
        return _Recorder(site, reduction, spans, rows, passes, buffer)

    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Reduce the relevance of one tensor in the running backward pass.

        Parameters
        ----------
        site
            Its site; one that no job asked for is passed over.
        layer
            Index of the decoder layer; 0 for a site without layers.
        value, gradient
            The tensor and dL/dx, [1, N, width].
        """
        for recorder in self._recorders.get(site, ()):
            if self.target >= recorder.passes:
                continue
            x, g = value[0], gradient[0]
            if recorder.rows is not None:
                # A copy only where the layer is on another device than the embeddings.
                rows = recorder.rows.to(x.device)
                x, g = x[rows], g[rows]
            folded = recorder.site.fold(relevance_of(x, g), self._shape)
            reduced = recorder.reduction.reduce(folded, tuple(recorder.spans.values()))
            recorder.buffer[self.target, layer].copy_(reduced, non_blocking=True)
            recorder.written += 1

    @contextmanager
    def attached(self, first: int, last: int) -> Iterator[None]:
        """Hook the sites of the layers `first` to `last` - 1 until the block ends.

        Tensors that the layers compute inside the block, where these require a gradient, record
        their relevance in every later backward pass through them.
        """
        handles: list[RemovableHandle] = []
        try:
            for index in range(first, last):
                for site, tap in self._taps:
                    module = tap.module(self._layers[index])
                    handles.append(self._hook(module, tap.side, site.name, index))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, side: Side, site: str, layer: int) -> RemovableHandle:
        def watch(tensor: torch.Tensor) -> None:
            # Detached: a hook that held the tensor itself would hold its own graph alive.
            value = tensor.detach()

            def on_gradient(gradient: torch.Tensor) -> None:
                self.record(site, layer, value, gradient)

            tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        if side is Side.INPUT:

            def before(_: nn.Module, args: tuple[Any, ...]) -> None:
                watch(args[0])

            return module.register_forward_pre_hook(before)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            watch(output[0] if isinstance(output, tuple) else output)

        hook: Callable[..., None] = after
        return module.register_forward_hook(hook)

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
                expected = recorder.buffer.shape[0] * recorder.buffer.shape[1]
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
                layers = recorder.reduction.select(recorder.buffer[trace], recorder.spans[job])
                _check_finite(site, layers)
                values = layers if recorder.site.per_layer else layers[0]
                # A copy even of a whole buffer: pinned memory does not leave the engine.
                values = values.clone(memory_format=torch.contiguous_format)
                tensors.append(SiteTensor(trace, site, "", values))
        return tuple(tensors)


def _check_finite(site: str, layers: torch.Tensor) -> None:
    finite = layers.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[-1])
        where = f" at layer {layer}" if SITES[site].per_layer else ""
        raise EngineError(
            f"the relevance of site {site!r} is not finite{where}: the model's weights or "
            "activations overflow, or are not finite themselves"
        )
