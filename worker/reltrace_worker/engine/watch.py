"""Hooks on the sites: tensors and their gradients, handed over while backward passes run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from reltrace_worker.engine.clock import PassClock
from reltrace_worker.engine.sites import SITES, Side, Site, Tap
from reltrace_worker.models.loading import LoadedModel


class Watch(ABC):
    """Sees the tensors of some sites, with their gradients. Set `target` before a backward pass.

    Parameters
    ----------
    loaded
        The model.
    wanted
        Decoder layers of each site, by its name; of a site without layers they do not matter.

    Attributes
    ----------
    target
        Index of the running backward pass: of the target, in each job.
    bottom
        The lowest decoder layer through which gradients must flow: at its input they can stop.
        0 where the embeddings are wanted; the number of layers where the output of the last
        layer is all that is wanted, or nothing.
    clock
        Times the phases of the pass.
    """

    def __init__(self, loaded: LoadedModel, wanted: Mapping[str, frozenset[int]]) -> None:
        self.target = 0
        self.clock = PassClock(loaded.device)
        self._layers = loaded.family.decoder_layers(loaded.model)
        self._taps: list[tuple[Site, Tap, frozenset[int]]] = [
            (SITES[name], tap(loaded.family), layers)
            for name, layers in wanted.items()
            if (tap := SITES[name].tap) is not None
        ]
        self.bottom = 0
        if "embed" not in wanted:
            self.bottom = min(
                (min(layers) + (1 if tap.is_layer_output else 0) for _, tap, layers in self._taps),
                default=len(self._layers),
            )

    @abstractmethod
    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take one tensor of the running backward pass.

        Parameters
        ----------
        site
            Its site; one that nobody wants is passed over.
        layer
            Index of the decoder layer; 0 for a site without layers.
        value, gradient
            The tensor and dL/dx, [1, N, width].
        """

    def record_start(self, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the tensor at the input of the layer `bottom`, where the gradients stop.

        That is the input embeddings, or else the output of the layer before: the one tensor
        that no hook of :meth:`attached` sees.

        Parameters
        ----------
        value, gradient
            The tensor and dL/dx, [1, N, hidden size].
        """
        if self.bottom == 0:
            self.record("embed", 0, value, gradient)
            return
        for site, tap, _ in self._taps:
            if tap.is_layer_output:
                self.record(site.name, self.bottom - 1, value, gradient)

    @contextmanager
    def attached(self, first: int, last: int) -> Iterator[None]:
        """Hook the sites of the layers `first` to `last` - 1 until the block ends.

        Tensors that the layers compute inside the block, where these require a gradient, record
        their relevance in every later backward pass through them.
        """
        handles: list[RemovableHandle] = []
        try:
            for index in range(first, last):
                for site, tap, wanted in self._taps:
                    if index not in wanted:
                        continue
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
