"""The forward and the backward passes of a pack, with and without checkpointing.

With checkpointing, the forward keeps nothing but the input of each segment of decoder layers (of
one layer, up to a depth of several). The backward recomputes one segment after the other, each
once for all targets, with the site hooks in place. The hooks see one computation only, so that
every site is exact; the model stays in eval mode; and one segment's graph at a time is alive.
(torch's own checkpointing recomputes once per target, and without reentry fires the hooks inside
a layer a second time.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from reltrace_worker.engine.edits import Edits, Rows
from reltrace_worker.engine.pack import Pack, Readout, Scalar
from reltrace_worker.engine.watch import Watch
from reltrace_worker.lrp.patching import instance_forward, single_logits
from reltrace_worker.models.loading import LoadedModel, ModelShape


def _starts(scalars: list[Scalar], passes: int) -> list[torch.Tensor]:
    """For each backward pass, the sum of its jobs' scalars.

    Jobs do not see each other, so the gradient of the sum is each job's own, started at 1.
    """
    return [
        torch.stack([scalar.value for scalar in scalars if scalar.target == index]).sum()
        for index in range(passes)
    ]


def _forward(
    loaded: LoadedModel, pack: Pack, readout: Readout, embeddings: torch.Tensor
) -> list[Scalar]:
    device = embeddings.device
    with ExitStack() as patches:
        if readout.only is not None:
            patches.enter_context(single_logits(loaded.model, readout.only))
        output = loaded.model(
            inputs_embeds=embeddings,
            position_ids=pack.position_ids(device),
            use_cache=False,
            # A list: a tensor would be on one device, and of a split model the logits on another.
            logits_to_keep=readout.rows,
            packing=pack.packing,
        )
    return readout.scalars(output.logits[0])


def _embed(loaded: LoadedModel, pack: Pack, edits: Edits) -> torch.Tensor:
    with torch.no_grad():
        embeddings = loaded.model.get_input_embeddings()(pack.token_ids(loaded.device))
        assert isinstance(embeddings, torch.Tensor)
        return edits.embedded(embeddings)


def _edits(loaded: LoadedModel, pack: Pack) -> Edits:
    starts, lengths = pack.packing.starts, pack.packing.lengths
    rows = [
        Rows(job.edits, start, range(length))
        for job, start, length in zip(pack.jobs, starts, lengths, strict=True)
        if job.edits
    ]
    return Edits(loaded, rows)


def predict(loaded: LoadedModel, pack: Pack) -> list[Scalar]:
    """Run the forward pass of a pack alone.

    Parameters
    ----------
    loaded
        The model, with a rule applied.
    pack
        The jobs.

    Returns
    -------
    list[Scalar]
        The resolved targets, job by job.
    """
    edits = _edits(loaded, pack)
    with torch.no_grad(), edits.attached():
        return _forward(loaded, pack, Readout(pack), _embed(loaded, pack, edits))


def _layer_output(output: Any) -> torch.Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def trace_keeping(loaded: LoadedModel, pack: Pack, capture: Watch) -> list[Scalar]:
    """Run the passes of a pack without checkpointing: one graph, one backward per target.

    The graph begins at the input of the layer ``capture.bottom``: below, nothing is kept.

    Parameters
    ----------
    loaded
        The model, with a rule applied.
    pack
        The jobs.
    capture
        Takes the relevance.

    Returns
    -------
    list[Scalar]
        The resolved targets, job by job, detached.
    """
    edits = _edits(loaded, pack)
    embeddings = _embed(loaded, pack, edits)
    layers = loaded.family.decoder_layers(loaded.model)
    roots: list[torch.Tensor] = []

    def begin(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        roots.append(_layer_output(output).requires_grad_())

    with ExitStack() as hooks:
        # First: what is captured is what the edits have made of it.
        hooks.enter_context(edits.attached())
        if capture.bottom == 0:
            roots.append(embeddings.requires_grad_())
        else:
            handle = layers[capture.bottom - 1].register_forward_hook(begin)
            hooks.callback(handle.remove)
        hooks.enter_context(capture.attached(capture.bottom, len(layers)))
        scalars = _forward(loaded, pack, Readout(pack), embeddings)
    (root,) = roots
    capture.clock.begins("backward")
    starts = _starts(scalars, pack.passes)
    for index, start in enumerate(starts):
        capture.target = index
        (gradient,) = torch.autograd.grad(start, root, retain_graph=index < len(starts) - 1)
        capture.record_start(root.detach(), gradient)
    return _detached(scalars)


@dataclass(slots=True)
class _LayerCall:
    """One call of a decoder layer: all that a recompute needs.

    Parameters
    ----------
    index, layer
        Which.
    hidden
        Its input; None inside a segment, where the layer before gives it.
    args, kwargs
        What else it was called with.
    """

    index: int
    layer: nn.Module
    hidden: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _recording(
    call: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None],
    layer: nn.Module,
    last: bool,
) -> Callable[..., Any]:
    forward = layer.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            output = forward(hidden, *args, **kwargs)
        call(hidden.detach(), args, kwargs)
        if last:
            # What follows the last layer (norm and logits) is small: kept, not recomputed.
            _layer_output(output).requires_grad_()
        return output

    return run


def segment_length(layers: int, hidden_size: int, graph_width: int) -> int:
    """Return how many layers to recompute in one go, so that the least memory is alive.

    Checkpointing keeps ``layers / s`` inputs of width `hidden_size` and the graph of s layers of
    width `graph_width` each. Their sum is smallest at ``s = sqrt(layers * hidden_size /
    graph_width)``, where it grows with the square root of the depth (Chen et al., "Training Deep
    Nets with Sublinear Memory Cost", 2016). A layer's graph is several times as wide as its
    input, so that s stays 1 up to that many layers.

    Parameters
    ----------
    layers
        Decoder layers.
    hidden_size
        Width of the residual stream.
    graph_width
        Values per token that the graph of one layer keeps.
    """
    return max(1, round(math.sqrt(layers * hidden_size / graph_width)))


def graph_width(shape: ModelShape) -> int:
    """Return about how many values per token the graph of one decoder layer keeps.

    Weights require no gradient, so linear layers keep nothing. Attention keeps query, key, value
    and output (at most four times the hidden size), the gated product its two factors.
    """
    return 4 * shape.hidden_size + 2 * shape.intermediate_size


def trace_checkpointed(loaded: LoadedModel, pack: Pack, capture: Watch) -> list[Scalar]:
    """Run the passes of a pack with checkpointing: the graph of one segment of layers at a time.

    Parameters and result are those of :func:`trace_keeping`, and so are the numbers.
    """
    with ExitStack() as hooks:
        edits = _edits(loaded, pack)
        # In the forward pass and in all that is computed again.
        hooks.enter_context(edits.attached())
        return _trace_checkpointed(loaded, pack, capture, _embed(loaded, pack, edits))


def _trace_checkpointed(
    loaded: LoadedModel, pack: Pack, capture: Watch, embeddings: torch.Tensor
) -> list[Scalar]:
    layers = loaded.family.decoder_layers(loaded.model)
    size = segment_length(len(layers), loaded.shape.hidden_size, graph_width(loaded.shape))
    bottom = capture.bottom
    tape: list[_LayerCall] = []
    tops: list[torch.Tensor] = []

    def note(index: int) -> Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None]:
        def call(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index >= bottom:
                begins = (index - bottom) % size == 0
                kept = hidden if begins else None
                tape.append(_LayerCall(index, layers[index], kept, args, kwargs))

        return call

    with ExitStack() as patches:
        for index, layer in enumerate(layers):
            recording = _recording(note(index), layer, last=index == len(layers) - 1)
            patches.enter_context(instance_forward(layer, recording))

        def keep_top(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            tops.append(_layer_output(output))

        top_hook = layers[-1].register_forward_hook(keep_top)
        patches.callback(top_hook.remove)
        scalars = _forward(loaded, pack, Readout(pack), embeddings)
    capture.clock.begins("backward")
    starts = _starts(scalars, pack.passes)
    root = tops.pop()
    gradients = [
        torch.autograd.grad(start, root, retain_graph=index < len(starts) - 1)[0]
        for index, start in enumerate(starts)
    ]
    scalars = _detached(scalars)
    # The graph above the last layer goes before the first layer is recomputed.
    root = root.detach()
    del starts
    while tape:
        segment = [tape.pop()]
        while segment[0].hidden is None:
            segment.insert(0, tape.pop())
        root = _through_segment(segment, capture, gradients)
    for index, gradient in enumerate(gradients):
        capture.target = index
        capture.record_start(root, gradient)
    return scalars


def _through_segment(
    segment: list[_LayerCall], capture: Watch, gradients: list[torch.Tensor]
) -> torch.Tensor:
    """Recompute some layers, and replace `gradients` at their output by those at their input.

    Returns
    -------
    torch.Tensor
        The input, detached.
    """
    first, last = segment[0], segment[-1]
    assert first.hidden is not None
    root = first.hidden.requires_grad_()
    output: Any = root
    with torch.enable_grad(), capture.attached(first.index, last.index + 1):
        for call in segment:
            output = _layer_output(call.layer(output, *call.args, **call.kwargs))
    for index, gradient in enumerate(gradients):
        capture.target = index
        (gradients[index],) = torch.autograd.grad(
            output, root, gradient.to(output.device), retain_graph=index < len(gradients) - 1
        )
    return root.detach()


def _detached(scalars: list[Scalar]) -> list[Scalar]:
    return [replace(scalar, value=scalar.value.detach()) for scalar in scalars]
