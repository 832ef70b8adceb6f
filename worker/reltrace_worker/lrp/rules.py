"""The rules: tables of module classes and of the functions that replace their ``forward``.

AttnLRP: Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", ICML 2024. CP-LRP: Ali et al., "XAI for Transformers: Better Explanations through
Conservative Propagation", ICML 2022. The tables have the form of LXT's own (``attnLRP`` and
``cp_LRP`` in ``lxt/efficient/models/*.py``).

To add a rule, add a row to ``RULES``. Norms and gated MLPs of a model family compute as LLaMA's,
unless an entry gives their class another function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from reltrace_worker.lrp.attention import AttentionFunction
from reltrace_worker.lrp.ops import (
    attnlrp_gated_product,
    cp_gated_product,
    rms_norm,
)
from reltrace_worker.lrp.rotary import (
    States,
    attention_states,
    forward_without_rotation,
    held_attention_states,
)
from reltrace_worker.models.families import FAMILIES

Forward = Callable[..., Any]
"""From a module and its inputs to its output."""

Patches = Mapping[type[nn.Module], tuple[str, Forward]]
"""By class of module: the method that is replaced, and the function that replaces it."""

GatedProduct = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the activation, the gate and the up projection to act(gate) * up."""


def _llama_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _olmo2_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight.float(), module.variance_epsilon)


def _gemma3_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, 1.0 + module.weight.float(), module.eps)


_NORMS: Patches = {
    **{family.norm: ("forward", _llama_norm) for family in FAMILIES.values()},
    Olmo2RMSNorm: ("forward", _olmo2_norm),
    Gemma3RMSNorm: ("forward", _gemma3_norm),
}


def _gated_mlps(product: GatedProduct) -> Patches:
    def llama_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
        neurons = product(module.act_fn, module.gate_proj(x), module.up_proj(x))
        return module.down_proj(neurons)  # type: ignore[no-any-return]

    def phi3_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        neurons = product(module.activation_fn, gate, up)
        return module.down_proj(neurons)  # type: ignore[no-any-return]

    return {
        **{family.gated_mlp: ("forward", llama_mlp) for family in FAMILIES.values()},
        Phi3MLP: ("forward", phi3_mlp),
    }


# In front of the attention kernel: rotary embeddings, and what becomes of the gradients.
_ROTATION: Patches = {
    family.attention: ("forward", forward_without_rotation(family.attention))
    for family in FAMILIES.values()
}


def _attnlrp_states(query: Any, key: Any, value: torch.Tensor) -> States:
    # The uniform rule halves what flows into either factor of both matrix products.
    return attention_states(query, key, value, (0.25, 0.25, 0.5))


def _with_states(change: Callable[..., States]) -> Callable[[AttentionFunction], AttentionFunction]:
    """Wrap an attention kernel so that it gets changed queries, keys and values."""

    def wrap(kernel: AttentionFunction) -> AttentionFunction:
        def attention(module: Any, query: Any, key: Any, value: Any, *rest: Any, **kw: Any) -> Any:
            return kernel(module, *change(query, key, value), *rest, **kw)

        return attention

    return wrap


def _unchanged(kernel: AttentionFunction) -> AttentionFunction:
    return kernel


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to propagate relevance."""

    name: str
    patches: Patches = field(default_factory=dict)
    wrap_attention: Callable[[AttentionFunction], AttentionFunction] = _unchanged
    # Tensors as wide as the MLP's neurons that a gated product keeps for its backward pass.
    mlp_tensors: int = 2
    # Whose functions these are, for a result's provenance: "fused" for those of this package,
    # "lxt" for LXT's, "" where nothing is replaced.
    functions: str = "fused"


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "attnlrp",
            {**_NORMS, **_ROTATION, **_gated_mlps(attnlrp_gated_product)},
            _with_states(_attnlrp_states),
        ),
        Rule(
            "cp_lrp",
            {**_NORMS, **_ROTATION, **_gated_mlps(cp_gated_product)},
            _with_states(held_attention_states),
        ),
        Rule("gradient", mlp_tensors=3, functions=""),
    )
}
