"""Hooks on the sites: tensors and their gradients, handed over while backward passes run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from reltrace_worker.engine.sites import SITES, HookPoint, Site
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.sharding import gather


class SiteHooks(ABC):
    """Sees the tensors of some sites, with their gradients. Set `target` before a backward pass.

    `layers` are the decoder layers of each site by name, any for a site without layers.
    """

    def __init__(self, loaded: LoadedModel, layers: Mapping[str, frozenset[int]]) -> None:
        # Index of the running backward pass: of the target, in each job.
        self.target = 0
        self.layers = layers
        self._loaded = loaded
        self._layers = loaded.family.decoder_layers(loaded.model)
        self._points: list[tuple[Site, HookPoint, frozenset[int]]] = [
            (SITES[name], point(loaded.family), wanted)
            for name, wanted in layers.items()
            if (point := SITES[name].hook_point) is not None
        ]
        # The lowest decoder layer through which gradients must flow: at its input they can stop.
        self.bottom = 0
        if "embed" not in layers:
            self.bottom = min(
                (min(wanted) + point.is_layer_output for _, point, wanted in self._points),
                default=len(self._layers),
            )

    @abstractmethod
    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take one tensor of the running backward pass and dL/dx, [1, N, width] each.

        A site that was not asked for is ignored; `layer` is 0 for a site without layers.
        """

    def record_bottom(self, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the tensor at the input of the layer `bottom`, where the gradients stop.

        That is the input embeddings, or else the output of the layer before: the one tensor
        that no hook of :meth:`attached` sees.
        """
        if self.bottom == 0:
            self.record("embed", 0, value, gradient)
            return
        for site, point, _ in self._points:
            if point.is_layer_output:
                self.record(site.name, self.bottom - 1, value, gradient)

    @contextmanager
    def attached(self, first: int, stop: int) -> Iterator[None]:
        """Hook the sites of the layers `first` to `stop` - 1 until the block ends.

        Tensors that the layers compute inside the block, where these require a gradient, are
        recorded in every later backward pass through them.
        """
        with ExitStack() as stack:
            for index in range(first, stop):
                for site, point, wanted in self._points:
                    if index in wanted:
                        hook = partial(self._watch, site.name, index)
                        stack.callback(point.register(self._layers[index], hook).remove)
            yield

    def _watch(self, site: str, layer: int, tensor: torch.Tensor) -> None:
        # Detached: a hook that held the tensor itself would hold its own graph alive.
        value = tensor.detach()

        def on_gradient(gradient: torch.Tensor) -> None:
            if SITES[site].axis not in self._loaded.divided:
                self.record(site, layer, value, gradient)
            elif (whole := gather(torch.stack((value, gradient)), self._loaded.ranks)) is not None:
                self.record(site, layer, *whole)

        tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
