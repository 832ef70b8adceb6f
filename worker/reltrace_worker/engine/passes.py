"""The forward and the backward passes of a batch, with and without checkpointing.

With checkpointing, the forward keeps nothing but the input of each segment of decoder layers (of
one layer, up to a depth of several). The backward recomputes one segment after the other, each
once for all targets, with the site hooks in place. The hooks see one computation only, so that
every site is exact; the model stays in eval mode; and one segment's graph at a time is alive.
(torch's own checkpointing recomputes once per target, and without reentry fires the hooks inside
a layer a second time.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.edits import EditHooks
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.sites import first_output
from reltrace_worker.engine.targets import Readout, Scalar
from reltrace_worker.lrp.patching import instance_forward, single_logits
from reltrace_worker.models.loading import LoadedModel, ModelShape

PHASES = ("forward", "backward", "transfer")


class PassTimer:
    """Times the phases of one pass.

    On CUDA by events between the kernels: a clock of the host would time how fast kernels are
    queued, and to wait for them would cost what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []

    def start(self, phase: str) -> None:
        """Note that a phase begins, and the one before it ends."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._marks.append((phase, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, once the device has done all of them."""
        self.start("")
        if (last := self._marks[-1][2]) is not None:
            last.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for begin, end in zip(self._marks, self._marks[1:], strict=False):
            (phase, started, first), (_, ended, second) = begin, end
            if first is not None and second is not None:
                seconds[phase] += first.elapsed_time(second) / 1000
            else:
                seconds[phase] += ended - started
        return seconds


Trace = Callable[[LoadedModel, PackedBatch, SiteHooks, PassTimer], list[Scalar]]
"""Runs the passes of a batch on a model with a rule applied; returns the scalars, job by job."""


def predict(loaded: LoadedModel, batch: PackedBatch, _: SiteHooks, __: PassTimer) -> list[Scalar]:
    """Run the forward pass of a batch alone."""
    edits = EditHooks.of(loaded, batch)
    with torch.no_grad(), edits.attached():
        readout = _forward(loaded, batch, _embed(loaded, batch, edits))[0]
    return readout.scalars()


def trace_keeping(
    loaded: LoadedModel,
    batch: PackedBatch,
    hooks: SiteHooks,
    timer: PassTimer,
    stop: Callable[[], bool] = lambda: False,
) -> list[Scalar]:
    """Run the passes of a batch without checkpointing: one graph, one backward per target.

    The graph begins at the input of the layer ``hooks.bottom``: below, nothing is kept. `stop` is
    asked after each backward pass whether to leave out the targets that follow.
    """
    edits = EditHooks.of(loaded, batch)
    embeddings = _embed(loaded, batch, edits)
    layers = loaded.family.decoder_layers(loaded.model)
    roots: list[torch.Tensor] = []

    def keep_root(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        roots.append(first_output(output).requires_grad_())

    with ExitStack() as stack:
        # First: the sites are to see the edited tensors.
        stack.enter_context(edits.attached())
        if hooks.bottom == 0:
            roots.append(embeddings.requires_grad_())
        else:
            handle = layers[hooks.bottom - 1].register_forward_hook(keep_root)
            stack.callback(handle.remove)
        stack.enter_context(hooks.attached(hooks.bottom, len(layers)))
        readout, terms = _forward(loaded, batch, embeddings)
    (root,) = roots
    timer.start("backward")
    for index in range(batch.backward_passes):
        hooks.target = index
        more = index < batch.backward_passes - 1
        (gradient,) = torch.autograd.grad(terms, root, readout.start(index), retain_graph=more)
        hooks.record_bottom(root.detach(), gradient)
        if stop():
            break
    return [scalar for scalar in readout.scalars() if scalar.index <= hooks.target]


def trace_checkpointed(
    loaded: LoadedModel, batch: PackedBatch, hooks: SiteHooks, timer: PassTimer
) -> list[Scalar]:
    """Run the passes of a batch with checkpointing; the numbers are those of `trace_keeping`."""
    edits = EditHooks.of(loaded, batch)
    # Edits are made in the forward pass and in all that is computed again.
    with edits.attached():
        embeddings = _embed(loaded, batch, edits)
        tape, readout, terms, root = _taped_forward(loaded, batch, hooks, embeddings)
        timer.start("backward")
        passes = range(batch.backward_passes)
        gradients = [
            torch.autograd.grad(terms, root, readout.start(i), retain_graph=i < len(passes) - 1)[0]
            for i in passes
        ]
        # The graph above the last layer goes before the first layer is recomputed.
        root = root.detach()
        del terms
        while tape:
            segment = [tape.pop()]
            while segment[0].hidden is None:
                segment.insert(0, tape.pop())
            root = _through_segment(segment, hooks, gradients)
    for index, gradient in enumerate(gradients):
        hooks.target = index
        hooks.record_bottom(root, gradient)
    return readout.scalars()


def segment_length(layers: int, hidden_size: int, graph_width: int) -> int:
    """Return how many layers to recompute in one go, so that the least memory is alive.

    Checkpointing keeps ``layers / s`` inputs of width `hidden_size` and the graph of s layers of
    `graph_width` values per token each. Their sum is smallest at ``s = sqrt(layers * hidden_size /
    graph_width)``, where it grows with the square root of the depth (Chen et al., "Training Deep
    Nets with Sublinear Memory Cost", 2016). A layer's graph is several times as wide as its
    input, so that s stays 1 up to that many layers.
    """
    return max(1, round(math.sqrt(layers * hidden_size / graph_width)))


def graph_width(shape: ModelShape) -> int:
    """Return about how many values per token the graph of one decoder layer keeps.

    Weights require no gradient, so linear layers keep nothing. Attention keeps query, key, value
    and output (at most four times the hidden size), the gated product its two factors.
    """
    return 4 * shape.hidden_size + 2 * shape.intermediate_size


def _embed(loaded: LoadedModel, batch: PackedBatch, edits: EditHooks) -> torch.Tensor:
    with torch.no_grad():
        embeddings = loaded.model.get_input_embeddings()(batch.token_ids(loaded.device))
        assert isinstance(embeddings, torch.Tensor)
        return edits.edit_embeddings(embeddings)


def _forward(
    loaded: LoadedModel, batch: PackedBatch, embeddings: torch.Tensor
) -> tuple[Readout, torch.Tensor]:
    """Run the forward pass; return the readout and the terms of the targets, float32 [M]."""
    readout = Readout(loaded, batch)
    with ExitStack() as patches:
        if readout.only is not None:
            patches.enter_context(single_logits(loaded.model, readout.only))
        output = loaded.model(
            inputs_embeds=embeddings,
            position_ids=batch.position_ids(embeddings.device),
            use_cache=False,
            logits_to_keep=readout.rows,
            packing=batch.packing,
        )
    return readout, readout.terms(output.logits[0])


@dataclass(frozen=True, slots=True)
class _LayerCall:
    """One call of a decoder layer: all that a recompute needs."""

    index: int
    layer: nn.Module
    # Its input; None inside a segment, where the layer before gives it.
    hidden: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _taped_forward(
    loaded: LoadedModel, batch: PackedBatch, hooks: SiteHooks, embeddings: torch.Tensor
) -> tuple[list[_LayerCall], Readout, torch.Tensor, torch.Tensor]:
    """Run the forward pass; return the calls of the layers, the readout, its terms, the output."""
    layers = loaded.family.decoder_layers(loaded.model)
    size = segment_length(len(layers), loaded.shape.hidden_size, graph_width(loaded.shape))
    tape: list[_LayerCall] = []
    tops: list[torch.Tensor] = []

    def taped(index: int, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = forward(hidden, *args, **kwargs)
            if index >= hooks.bottom:
                begins = (index - hooks.bottom) % size == 0
                kept = hidden.detach() if begins else None
                tape.append(_LayerCall(index, layer, kept, args, kwargs))
            if index == len(layers) - 1:
                # What follows the last layer (norm and logits) is small: kept, not recomputed.
                first_output(output).requires_grad_()
            return output

        return run

    with ExitStack() as patches:
        for index, layer in enumerate(layers):
            patches.enter_context(instance_forward(layer, taped(index, layer)))

        def keep_top(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            tops.append(first_output(output))

        top_hook = layers[-1].register_forward_hook(keep_top)
        patches.callback(top_hook.remove)
        readout, terms = _forward(loaded, batch, embeddings)
    return tape, readout, terms, tops.pop()


def _through_segment(
    segment: list[_LayerCall], hooks: SiteHooks, gradients: list[torch.Tensor]
) -> torch.Tensor:
    """Recompute some layers, and replace `gradients` at their output by those at their input.

    Returns the input, detached.
    """
    first, last = segment[0], segment[-1]
    assert first.hidden is not None
    root = first.hidden.requires_grad_()
    output: Any = root
    with torch.enable_grad(), hooks.attached(first.index, last.index + 1):
        for call in segment:
            output = first_output(call.layer(output, *call.args, **call.kwargs))
    for index, gradient in enumerate(gradients):
        hooks.target = index
        (gradients[index],) = torch.autograd.grad(
            output, root, gradient.to(output.device), retain_graph=index < len(gradients) - 1
        )
    return root.detach()
