"""The forward and the backward passes of a pack, with and without checkpointing.

With checkpointing, the forward keeps nothing but the input of each decoder layer. The backward
recomputes one layer after the other, each once for all targets, with the site hooks in place.
The hooks see one computation only, so that every site is exact; the model stays in eval mode;
and one layer's graph at a time is alive. (torch's own checkpointing recomputes once per target,
and without reentry fires the hooks inside a layer a second time.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reltrace_worker.engine.capture import Capture
from reltrace_worker.engine.pack import Pack, Readout, Scalar
from reltrace_worker.model.loading import LoadedModel
from reltrace_worker.rules.patching import instance_forward


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
    output = loaded.model(
        inputs_embeds=embeddings,
        position_ids=pack.position_ids(device),
        use_cache=False,
        # A list: a tensor would be on one device, and of a split model the logits on another.
        logits_to_keep=readout.rows,
        packing=pack.packing,
    )
    return readout.scalars(output.logits[0])


def _embed(loaded: LoadedModel, pack: Pack) -> torch.Tensor:
    with torch.no_grad():
        embeddings = loaded.model.get_input_embeddings()(pack.token_ids(loaded.device))
    assert isinstance(embeddings, torch.Tensor)
    return embeddings


def trace_keeping(loaded: LoadedModel, pack: Pack, capture: Capture) -> list[Scalar]:
    """Run the passes of a pack without checkpointing: one graph, one backward per target.

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
    embeddings = _embed(loaded, pack).requires_grad_()
    layers = len(loaded.family.decoder_layers(loaded.model))
    with capture.attached(0, layers):
        scalars = _forward(loaded, pack, Readout(pack), embeddings)
    starts = _starts(scalars, pack.passes)
    for index, start in enumerate(starts):
        capture.target = index
        (gradient,) = torch.autograd.grad(start, embeddings, retain_graph=index < len(starts) - 1)
        capture.record("embed", 0, embeddings.detach(), gradient)
    return _detached(scalars)


@dataclass(slots=True)
class _LayerCall:
    """One call of a decoder layer: all that a recompute needs."""

    index: int
    layer: nn.Module
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _recording(
    index: int, layer: nn.Module, tape: list[_LayerCall], last: bool
) -> Callable[..., torch.Tensor]:
    forward = layer.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            output = forward(hidden, *args, **kwargs)
        assert isinstance(output, torch.Tensor)
        tape.append(_LayerCall(index, layer, hidden.detach(), args, kwargs))
        # What follows the last layer (norm and logits) is small: it is kept, not recomputed.
        return output.requires_grad_() if last else output

    return run


def trace_checkpointed(loaded: LoadedModel, pack: Pack, capture: Capture) -> list[Scalar]:
    """Run the passes of a pack with checkpointing: one layer's graph at a time.

    Parameters and result are those of :func:`trace_keeping`, and so are the numbers.
    """
    embeddings = _embed(loaded, pack)
    layers = loaded.family.decoder_layers(loaded.model)
    tape: list[_LayerCall] = []
    tops: list[torch.Tensor] = []
    with ExitStack() as patches:
        for index, layer in enumerate(layers):
            recording = _recording(index, layer, tape, last=index == len(layers) - 1)
            patches.enter_context(instance_forward(layer, recording))

        def keep_top(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
            tops.append(output)

        top_hook = layers[-1].register_forward_hook(keep_top)
        patches.callback(top_hook.remove)
        scalars = _forward(loaded, pack, Readout(pack), embeddings)
    starts = _starts(scalars, pack.passes)
    (top,) = tops
    gradients = [
        torch.autograd.grad(start, top, retain_graph=index < len(starts) - 1)[0]
        for index, start in enumerate(starts)
    ]
    scalars = _detached(scalars)
    # The graph above the last layer goes before the first layer is recomputed.
    tops.clear()
    del top, starts
    while tape:
        call = tape.pop()
        hidden = call.hidden.requires_grad_()
        with torch.enable_grad(), capture.attached(call.index, call.index + 1):
            output = call.layer(hidden, *call.args, **call.kwargs)
        for index, gradient in enumerate(gradients):
            capture.target = index
            (gradients[index],) = torch.autograd.grad(
                output, hidden, gradient.to(output.device), retain_graph=index < len(gradients) - 1
            )
    for index, gradient in enumerate(gradients):
        capture.target = index
        # A split model may have moved the embeddings before its first layer took them.
        capture.record("embed", 0, embeddings.detach(), gradient.to(embeddings.device))
    return scalars


def _detached(scalars: list[Scalar]) -> list[Scalar]:
    return [Scalar(s.job, s.target, s.token_ids, s.value.detach()) for s in scalars]
