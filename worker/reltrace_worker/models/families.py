"""The supported architectures: one row per family.

A row says which classes are norm, gated MLP, attention and decoder layer, and under which path
inside a decoder layer the points of interest stand. Rules and sites are written against these
roles, so that a further family is a further row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from reltrace_worker.types.errors import ModelError


class NormKind(Enum):
    """How a norm computes: the rules have one function for each."""

    RMS = "x / rms(x), rounded to the model's dtype, times weight"
    RMS_PLUS_ONE = "x / rms(x) times (1 + weight), rounded to the model's dtype at the end"


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
    norm_kind
        How its norms compute.
    norms_per_layer
        Norms in a decoder layer, those of queries and keys included.
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
    norm_kind: NormKind = NormKind.RMS
    norms_per_layer: int = 2

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
        Family(
            model_type="mistral",
            causal_lm=MistralForCausalLM,
            decoder_layer=modeling_mistral.MistralDecoderLayer,
            norm=modeling_mistral.MistralRMSNorm,
            gated_mlp=modeling_mistral.MistralMLP,
            attention=modeling_mistral.MistralAttention,
        ),
        Family(
            model_type="qwen2",
            causal_lm=Qwen2ForCausalLM,
            decoder_layer=modeling_qwen2.Qwen2DecoderLayer,
            norm=modeling_qwen2.Qwen2RMSNorm,
            gated_mlp=modeling_qwen2.Qwen2MLP,
            attention=modeling_qwen2.Qwen2Attention,
        ),
        Family(
            model_type="qwen3",
            causal_lm=Qwen3ForCausalLM,
            decoder_layer=modeling_qwen3.Qwen3DecoderLayer,
            norm=modeling_qwen3.Qwen3RMSNorm,
            gated_mlp=modeling_qwen3.Qwen3MLP,
            attention=modeling_qwen3.Qwen3Attention,
            norms_per_layer=4,
        ),
        Family(
            model_type="gemma3_text",
            causal_lm=Gemma3ForCausalLM,
            decoder_layer=modeling_gemma3.Gemma3DecoderLayer,
            norm=modeling_gemma3.Gemma3RMSNorm,
            gated_mlp=modeling_gemma3.Gemma3MLP,
            attention=modeling_gemma3.Gemma3Attention,
            # What is added to the residual stream passes another norm first.
            attention_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
            mid_reader="pre_feedforward_layernorm",
            norm_kind=NormKind.RMS_PLUS_ONE,
            norms_per_layer=6,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class TextPart:
    """How a checkpoint that holds images too holds a model of a family as its text part.

    Parameters
    ----------
    model_type
        Of the text part: a key of ``FAMILIES``.
    prefix
        Of the names of the text part's weights.
    others
        Prefixes of the weights that are left out.
    """

    model_type: str
    prefix: str
    others: tuple[str, ...]


TEXT_PARTS: dict[str, TextPart] = {
    "gemma3": TextPart(
        "gemma3_text", "language_model.", ("vision_tower.", "multi_modal_projector.")
    )
}
"""By the ``model_type`` of the whole checkpoint."""

# A pack holds prompts of many lengths, and these rotary embeddings choose their frequencies by
# the longest position of the whole forward: a result would depend on its neighbours.
_PACK_DEPENDENT_ROPE = frozenset({"longrope"})
# What transformers computes with, but does not check, or warns of only.
_ROPE_NUMBERS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
    }
)
# So do these, but they can be given the frequencies of one length.
_DYNAMIC_ROPE = "dynamic"


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


def check_config(config: Any) -> None:
    """Refuse what a model of a supported architecture can be configured to, but a trace can not.

    Parameters
    ----------
    config
        Of a model, which need not be loaded.

    Raises
    ------
    ModelError
        Its rotary embeddings depend on the other prompts of a pass or on what is no number, or its
        attention is not causal; names the setting.
    """
    for rope in _rope_parameters(config):
        rope_type = str(rope.get("rope_type", "default"))
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ModelError(f"rope type {rope_type!r} in config.json is unknown")
        if rope_type in _PACK_DEPENDENT_ROPE or (
            rope_type == _DYNAMIC_ROPE and len(_rope_parameters(config)) > 1
        ):
            raise ModelError(
                f"rope type {rope_type!r} is not supported: its frequencies depend on the longest "
                "prompt of a pass, so a result would depend on what it was computed with"
            )
        for field in _ROPE_NUMBERS & rope.keys():
            # transformers has a value of its own for null, but for no factor.
            missing = rope[field] is None and (field != "factor" or rope_type == "default")
            if not missing and not isinstance(rope[field], int | float):
                raise ModelError(
                    f"{field} in rope_parameters (or rope_scaling) of config.json is "
                    f"{rope[field]!r}; it must be a number"
                )
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            "use_bidirectional_attention is not supported: a token's logits would depend on what "
            "follows it"
        )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of the rotary embeddings, one for each kind of layer."""
    rope: dict[str, Any] = config.rope_parameters or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def context_length(config: Any, asked: int | None = None) -> int:
    """Return how many tokens a prompt may have.

    Scaled rotary embeddings reach further than ``max_position_embeddings`` says, by the rule of
    vLLM (``_get_and_verify_max_len``): linear and dynamic ones its multiple by their factor, yarn
    the multiple of the length before scaling. Of llama3, and of Gemma 3, it is the length after it.

    Parameters
    ----------
    config
        Of a loaded model.
    asked
        Less than that, if somebody wants less.

    Raises
    ------
    ModelError
        More is asked for; says how much is allowed.
    """
    longest = float(config.max_position_embeddings)
    ropes = _rope_parameters(config)
    if len(ropes) == 1 and ropes[0].get("rope_type") in ("linear", "yarn", _DYNAMIC_ROPE):
        if ropes[0]["rope_type"] == "yarn":
            longest = ropes[0].get("original_max_position_embeddings") or longest
        longest *= ropes[0].get("factor") or 1.0
    if asked is not None and not 1 <= asked <= longest:
        raise ModelError(
            f"a context length of {asked} is not possible; of this model, allowed: 1 to "
            f"{int(longest)} tokens"
        )
    return int(longest) if asked is None else asked


def fix_frequencies(model: PreTrainedModel, length: int) -> None:
    """Give dynamic rotary embeddings the frequencies of prompts of one length, as vLLM does.

    They would change with the longest prompt of a pass. Up to ``max_position_embeddings`` they are
    the unscaled ones.

    Parameters
    ----------
    model
        Loaded.
    length
        Its context length in tokens.
    """
    if _rope_parameters(model.config)[0].get("rope_type") != _DYNAMIC_ROPE:
        return
    rotary: Any = model.get_submodule("model.rotary_emb")
    frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS[_DYNAMIC_ROPE](
        model.config, rotary.inv_freq.device, seq_len=length
    )
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        buffer.copy_(frequencies)
    # Computed as it stands from here on.
    rotary.rope_type = "default"
