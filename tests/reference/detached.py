"""LRP as plain autograd over a detached forward pass, without anything of reltrace or lxt.

The modules of a model get forward functions written out after the papers: what a rule holds
constant is detached, and the uniform rule halves what flows into either factor of a product.
``gradient.py`` then reads relevance off as gradient times input, in any number format.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def halved(product: Product, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Uniform rule (AttnLRP, equation 7): half of a product's relevance goes to each factor."""
    return (product(a, b.detach()) + product(a.detach(), b)) / 2


def by_ratio(function: Any, x: torch.Tensor) -> torch.Tensor:
    """Identity rule (AttnLRP, equation 9): f(x) = x * (f(x) / x), with the ratio held."""
    return x * (function(x) / x).detach()


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    gemma = hasattr(module, "eps")
    epsilon = module.eps if gemma else module.variance_epsilon
    inverse = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return x * inverse.detach() * (module.weight + 1 if gemma else module.weight)


def mlp(rule: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).split(module.down_proj.in_features, -1)
            function = module.activation_fn
        else:
            gate, up, function = module.gate_proj(x), module.up_proj(x), module.act_fn
        if rule == "cp_lrp":
            return module.down_proj(function(gate).detach() * up)  # type: ignore[no-any-return]
        return module.down_proj(halved(torch.mul, by_ratio(function, gate), up))  # type: ignore[no-any-return]

    return forward


def attention(rule: str) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        module: Any, query: Any, key: Any, value: Any, _: Any, *, scaling: float, **more: Any
    ) -> tuple[torch.Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, 1) for states in (key, value))
        tokens = query.shape[2]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if more.get("sliding_window"):
            seen &= seen.triu(1 - more["sliding_window"])
        if rule == "attnlrp":
            scores = halved(torch.matmul, query, key.mT)
            weights = (scores * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
            output = halved(torch.matmul, weights, value)
        else:
            scores = query @ key.mT * scaling
            output = scores.masked_fill(~seen, -torch.inf).softmax(-1).detach() @ value
        return output.transpose(1, 2), None

    return forward


def detach(model: Any, rule: str) -> None:
    """Let autograd over `model` follow a rule; "gradient" leaves it as transformers has it."""
    if rule == "gradient":
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
        elif type(module).__name__.endswith("MLP"):
            module.forward = MethodType(mlp(rule), module)
    AttentionInterface.register(f"detached_{rule}", attention(rule))
    AttentionMaskInterface.register(f"detached_{rule}", lambda *_, **__: None)
    model.config._attn_implementation = f"detached_{rule}"
