"""Gradient times input by plain autograd, without anything of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reltrace_worker.engine import SITES
from reltrace_worker.model import LoadedModel

# Where a layer of Gemma 3 and of all others has the outputs of attention and MLP.
SANDWICHED = ("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm")
PLAIN = ("self_attn", "mlp", "post_attention_layernorm")


def plain_gradient_times_input(
    loaded: LoadedModel,
    token_ids: tuple[int, ...],
    scalar: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits[-1].max(),
) -> dict[str, torch.Tensor]:
    """Full traces of one prompt by ``retain_grad``, on the model as transformers runs it.

    `scalar` is made of the logits, [T, vocabulary]. Returns float32 [L, T, F] per site, ``embed``
    [T, F], on the CPU.
    """
    model: Any = loaded.model
    kept: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def keep(site: str) -> Any:
        def hook(_: Any, args: Any, output: Any = None) -> None:
            tensor = args[0] if output is None else output
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            tensor.retain_grad()
            kept[site].append(tensor)

        return hook

    attention, mlp, reader = SANDWICHED if model.config.model_type == "gemma3_text" else PLAIN
    handles = []
    for layer in model.model.layers:
        handles += [
            layer.register_forward_hook(keep("resid")),
            getattr(layer, reader).register_forward_pre_hook(keep("resid_mid")),
            getattr(layer, attention).register_forward_hook(keep("attn_out")),
            getattr(layer, mlp).register_forward_hook(keep("mlp_out")),
            layer.self_attn.o_proj.register_forward_pre_hook(keep("head")),
            layer.mlp.down_proj.register_forward_pre_hook(keep("neuron")),
        ]
    embeddings = model.model.embed_tokens(
        torch.tensor([token_ids], device=loaded.device)
    ).requires_grad_()
    kept["embed"].append(embeddings)
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    scalar(logits).backward()
    for handle in handles:
        handle.remove()
    traces = {}
    for site, tensors in kept.items():
        relevance = torch.stack([(t * t.grad).detach()[0].cpu() for t in tensors])
        if site == "head":
            relevance = relevance.unflatten(-1, (model.config.num_attention_heads, -1)).sum(-1)
        traces[site] = relevance[0] if site == "embed" else relevance
    return traces
