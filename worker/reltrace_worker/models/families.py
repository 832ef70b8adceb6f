"""The supported architectures: one row per family.

A row names the classes of a family's modules, and the paths inside a decoder layer at which sites
read. What rules put in the place of these classes is in ``lrp/rules.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

from reltrace_worker.types.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """The modules of a model family."""

    # In a checkpoint's config.
    model_type: str
    causal_lm: type[Any]
    # Every norm, gated MLP and attention of a model is an instance of these.
    norm: type[nn.Module]
    gated_mlp: type[nn.Module]
    attention: type[nn.Module]
    # Paths in a decoder layer: of the modules whose output is added to the residual stream, of the
    # one that reads the stream between attention and MLP, and of those whose input is the
    # concatenated heads and the neurons.
    attention_out: str = "self_attn"
    mlp_out: str = "mlp"
    mid_reader: str = "post_attention_layernorm"
    head_reader: str = "self_attn.o_proj"
    neuron_reader: str = "mlp.down_proj"
    # Attribute of the gated MLP.
    activation: str = "act_fn"
    # Those of queries and keys included.
    norms_per_layer: int = 2
    # No norm spans several heads.
    heads_are_independent: bool = True

    def decoder_layers(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder layers of `model` in order."""
        layers = model.get_submodule("model.layers")
        assert isinstance(layers, nn.ModuleList)
        return list(layers)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            causal_lm=LlamaForCausalLM,
            norm=modeling_llama.LlamaRMSNorm,
            gated_mlp=modeling_llama.LlamaMLP,
            attention=modeling_llama.LlamaAttention,
        ),
        Family(
            model_type="mistral",
            causal_lm=MistralForCausalLM,
            norm=modeling_mistral.MistralRMSNorm,
            gated_mlp=modeling_mistral.MistralMLP,
            attention=modeling_mistral.MistralAttention,
        ),
        Family(
            model_type="qwen2",
            causal_lm=Qwen2ForCausalLM,
            norm=modeling_qwen2.Qwen2RMSNorm,
            gated_mlp=modeling_qwen2.Qwen2MLP,
            attention=modeling_qwen2.Qwen2Attention,
        ),
        Family(
            model_type="qwen3",
            causal_lm=Qwen3ForCausalLM,
            norm=modeling_qwen3.Qwen3RMSNorm,
            gated_mlp=modeling_qwen3.Qwen3MLP,
            attention=modeling_qwen3.Qwen3Attention,
            norms_per_layer=4,
        ),
        Family(
            model_type="gemma3_text",
            causal_lm=Gemma3ForCausalLM,
            norm=modeling_gemma3.Gemma3RMSNorm,
            gated_mlp=modeling_gemma3.Gemma3MLP,
            attention=modeling_gemma3.Gemma3Attention,
            # Outputs of attention and MLP are normalized before they are added.
            attention_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
            mid_reader="pre_feedforward_layernorm",
            norms_per_layer=6,
        ),
        Family(
            model_type="olmo2",
            causal_lm=Olmo2ForCausalLM,
            norm=modeling_olmo2.Olmo2RMSNorm,
            gated_mlp=modeling_olmo2.Olmo2MLP,
            attention=modeling_olmo2.Olmo2Attention,
            # Outputs of attention and MLP are normalized, their inputs are not.
            attention_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
            mid_reader="mlp",
            norms_per_layer=4,
            heads_are_independent=False,
        ),
        Family(
            model_type="phi3",
            causal_lm=Phi3ForCausalLM,
            norm=modeling_phi3.Phi3RMSNorm,
            gated_mlp=modeling_phi3.Phi3MLP,
            attention=modeling_phi3.Phi3Attention,
            activation="activation_fn",
        ),
        Family(
            model_type="smollm3",
            causal_lm=SmolLM3ForCausalLM,
            norm=modeling_smollm3.SmolLM3RMSNorm,
            gated_mlp=modeling_smollm3.SmolLM3MLP,
            attention=modeling_smollm3.SmolLM3Attention,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class TextPart:
    """The text model inside a checkpoint that takes images too."""

    # A key of FAMILIES.
    model_type: str
    # How the names of the text model's weights begin, and those of the others.
    prefix: str
    others: tuple[str, ...]


TEXT_PARTS: dict[str, TextPart] = {
    "gemma3": TextPart(
        "gemma3_text", "language_model.", ("vision_tower.", "multi_modal_projector.")
    )
}
"""By the ``model_type`` of the whole checkpoint."""


def family_named(model_type: str) -> Family:
    """Return the family of a config's ``model_type``, or of its text part.

    Raises
    ------
    ModelError
        The architecture is not supported; names it and the supported ones.
    """
    part = TEXT_PARTS.get(model_type)
    family = FAMILIES.get(model_type if part is None else part.model_type)
    if family is None:
        supported = ", ".join([*FAMILIES, *(f"{name} (its text part)" for name in TEXT_PARTS)])
        raise ModelError(f"architecture {model_type!r} is not supported; supported: {supported}")
    return family


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model that transformers built."""
    return family_named(str(model.config.model_type))
