"""The supported architectures: one row per family.

A row says which classes are norm, gated MLP, attention and decoder layer, and under which path
inside a decoder layer the points of interest stand. Rules and sites are written against these
roles, so that a further family is a further row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from reltrace_worker.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model family keeps what the rules and the sites need.

    Parameters
    ----------
    model_type
        ``model_type`` in a checkpoint's config.
    causal_lm, decoder_layer, norm, gated_mlp, attention
        Its classes. Every norm, gated MLP and attention of a model is an instance of these.
    layers
        Path of the list of decoder layers in the model.
    attention_out, mlp_out
        Paths, inside a decoder layer, of the modules whose output is added to the residual stream.
    mid_reader
        Path of the module that reads the residual stream between attention and MLP.
    head_reader
        Path of the module whose input is the concatenated attention heads.
    neuron_reader
        Path of the module whose input is the neurons of the MLP.
    """

    model_type: str
    causal_lm: type[Any]
    decoder_layer: type[nn.Module]
    norm: type[nn.Module]
    gated_mlp: type[nn.Module]
    attention: type[nn.Module]
    layers: str = "model.layers"
    attention_out: str = "self_attn"
    mlp_out: str = "mlp"
    mid_reader: str = "post_attention_layernorm"
    head_reader: str = "self_attn.o_proj"
    neuron_reader: str = "mlp.down_proj"

    def decoder_layers(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder layers of `model` in order."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return list(layers)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            causal_lm=LlamaForCausalLM,
            decoder_layer=modeling_llama.LlamaDecoderLayer,
            norm=modeling_llama.LlamaRMSNorm,
            gated_mlp=modeling_llama.LlamaMLP,
            attention=modeling_llama.LlamaAttention,
        ),
    )
}

# A pack holds prompts of many lengths, and these rotary embeddings choose their frequencies by
# the longest position of the whole forward: a result would depend on its neighbours.
_PACK_DEPENDENT_ROPE = frozenset({"longrope"})


def family_named(model_type: str) -> Family:
    """Return the family of a config's ``model_type``.

    Raises
    ------
    ModelError
        The architecture is not supported; names it and the supported ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return family


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model that transformers built."""
    return family_named(str(model.config.model_type))


def check_rope(rope_type: str) -> None:
    """Refuse rotary embeddings whose frequencies depend on the other prompts of a pass.

    Raises
    ------
    ModelError
        Names the rope type.
    """
    if rope_type in _PACK_DEPENDENT_ROPE:
        raise ModelError(
            f"rope type {rope_type!r} is not supported: its frequencies depend on the longest "
            "prompt of a pass, so a result would depend on what it was computed with"
        )
