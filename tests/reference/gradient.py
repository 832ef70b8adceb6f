"""Gradient times input of every site by ``retain_grad``, without anything of reltrace.

On a model as transformers runs it this is the plain gradient; on one whose classes lxt has
patched it is the relevance of lxt's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SITES = ("embed", "resid", "resid_mid", "attn_out", "mlp_out", "head", "neuron")

# In a layer, the modules that put out what attention and MLP add, and the one that reads between.
PLAIN = ("self_attn", "mlp", "post_attention_layernorm")
NORMALIZED = {
    "gemma3_text": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", "mlp"),
}


@dataclass(frozen=True, slots=True)
class Reference:
    """Full traces of one prompt for one scalar.

    Attributes
    ----------
    values : dict of str to Tensor
        float32 on the CPU, [L, T, F] per site; ``embed`` is [T, F].
    terms : dict of str to Tensor
        Of the same shapes: the sum of the absolute values of what each value sums. That is the
        absolute value itself, but for ``head``, which sums over the features of a head.
    token_id : int
        The token with the largest logit.
    logit : float
        That logit, at which the backward pass starts with 1.
    """

    values: dict[str, torch.Tensor]
    terms: dict[str, torch.Tensor]
    token_id: int
    logit: float


def gradient_times_input(
    model: Any,
    token_ids: tuple[int, ...] | list[int],
    scalar: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits[-1].max(),
) -> Reference:
    """Run one prompt through ``model``, a causal LM of transformers, and back.

    `scalar` makes where the backward pass starts of the logits, [T, vocabulary].
    """
    kept: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def keep(site: str) -> Any:
        def hook(_: Any, args: Any, output: Any = None) -> None:
            tensor = args[0] if output is None else output
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            tensor.retain_grad()
            kept[site].append(tensor)

        return hook

    attention, mlp, reader = NORMALIZED.get(model.config.model_type, PLAIN)
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
    ids = torch.tensor([list(token_ids)], device=model.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    kept["embed"].append(embeddings)
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    scalar(logits).backward()
    logit, token_id = logits[-1].detach().max(dim=-1)
    for handle in handles:
        handle.remove()
    values, terms = {}, {}
    for site, tensors in kept.items():
        assert tensors, f"no tensor was seen at {site}"
        relevance = torch.stack([(t.float() * t.grad.float()).detach()[0].cpu() for t in tensors])
        absolute = relevance.abs()
        if site == "head":
            by_head = (model.config.num_attention_heads, -1)
            relevance, absolute = (v.unflatten(-1, by_head).sum(-1) for v in (relevance, absolute))
        values[site] = relevance[0] if site == "embed" else relevance
        terms[site] = absolute[0] if site == "embed" else absolute
    return Reference(values, terms, int(token_id), float(logit))
