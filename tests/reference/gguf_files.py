"""GGUF files out of the reference checkpoints, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from reference.checkpoints import Recipe, build_config, build_model, build_tokenizer
from transformers import PreTrainedModel

_ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, family: str) -> str:
    """Return what llama.cpp calls a weight."""
    if name == "model.norm.weight":
        return "output_norm.weight"
    *path, module, suffix = name.split(".")
    names = _GEMMA_NAMES if family == "gemma3_text" else _NAMES
    block = f"blk.{path[2]}." if "layers" in path else ""
    return f"{block}{names[module]}.{suffix}"


def as_stored(name: str, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return a weight as llama.cpp stores it: rotations interleaved, Gemma's norms plus one."""
    if recipe.family == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    heads = {"q_proj": recipe.heads, "k_proj": recipe.key_value_heads}.get(name.split(".")[-2])
    if recipe.family not in ("llama", "mistral") or heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def add_byte_level_tokenizer(writer: GGUFWriter, vocab_size: int, pre: str = "gpt-2") -> None:
    """Write the reference tokenizer."""
    backend = json.loads(build_tokenizer(vocab_size).backend_tokenizer.to_str())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].__getitem__)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def write_gguf(
    path: Path,
    recipe: Recipe,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: Callable[[GGUFWriter], None] | None = None,
    change: Callable[[GGUFWriter], None] = lambda _: None,
    leave_out: Sequence[str] = (),
) -> Path:
    """Write the model of a recipe, its matrices quantized.

    Parameters
    ----------
    kind
        Of matrices; vectors are in float32, as everywhere.
    tokenizer
        Writes another tokenizer than the reference one.
    change
        Writes further metadata or tensors.
    leave_out
        Names of weights.
    """
    config: Any = build_config(recipe)
    architecture = _ARCHITECTURES.get(recipe.family, recipe.family)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    writer.add_key_length(head_dim or config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if recipe.family == "gemma3_text":
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
    if recipe.sliding_window and recipe.family in ("mistral", "gemma3_text"):
        writer.add_sliding_window(recipe.sliding_window)
    if tokenizer is None:
        add_byte_level_tokenizer(writer, recipe.vocab_size)
    else:
        tokenizer(writer)
    change(writer)
    for name, weight in (model or build_model(recipe)).state_dict().items():
        if (recipe.tied and name == "lm_head.weight") or name in leave_out:
            continue
        stored = as_stored(name, weight.float(), recipe).contiguous().numpy()
        gguf = gguf_name(name, recipe.family)
        if stored.ndim == 1 or kind is GGMLQuantizationType.F32:
            writer.add_tensor(gguf, np.ascontiguousarray(stored))
        else:
            writer.add_tensor(gguf, quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
