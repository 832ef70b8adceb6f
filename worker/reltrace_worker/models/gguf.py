"""GGUF files: config, tokenizer and weights of the supported families out of a single file.

transformers reads these files too, but takes half a minute for a vocabulary of 262,144 tokens, and
leaves a model that counts as quantized. Here the weights are dequantized by the package ``gguf``,
one by one as transformers asks for them.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reltrace_worker.models.gguf_header import GgufTensor, read_header
from reltrace_worker.models.gguf_tokenizer import build_tokenizer
from reltrace_worker.types.errors import ModelError

_CHUNK = 1 << 22
"""Weights that are dequantized at once: 16 MiB in float32."""

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_MODULES = _MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_ROPE_FACTORS = "rope_freqs.weight"
"""What LLaMA 3.1 and later divide their rotary frequencies by."""

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}


class GgufFile:
    """A GGUF file whose header has been read."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ModelError(
                f"{path.name} is a GGUF file, which needs the package gguf: pip install gguf"
            ) from error
        self._gguf = gguf
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self._tensors = read_header(self._data)
            end = max((t.offset + self._bytes(t) for t in self._tensors.values()), default=0)
            if end > len(self._data):
                raise ValueError(f"it is cut short: {len(self._data)} of {end} bytes")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path} can not be read as GGUF: {error}") from error
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise ModelError(
                f"{path} is one of {parts} parts; put them together with llama-gguf-split --merge"
            )

    def _bytes(self, tensor: GgufTensor) -> int:
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(tensor.kind)]
        return prod(tensor.shape) // block * size

    @property
    def _architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def _setting(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise ModelError(f"{self._path} does not say {self._architecture}.{name}")
        return value

    def config(self) -> dict[str, Any]:
        """Return what a ``config.json`` of this model would hold."""
        model_type = _MODEL_TYPES.get(self._architecture)
        if model_type is None or self._setting("expert_count", 0):
            raise ModelError(
                f"{self._path} is of architecture {self._architecture!r}"
                + (" with experts" if model_type else "")
                + f"; supported GGUF files: {', '.join(_MODEL_TYPES)} (Mistral's are llama)"
            )
        heads = self._setting("attention.head_count")
        hidden = self._setting("embedding_length")
        layers = self._setting("block_count")
        head_dim = self._setting("attention.key_length", hidden // heads)
        if (rotated := self._setting("rope.dimension_count", head_dim)) != head_dim:
            raise ModelError(
                f"{self._path} rotates {rotated} of {head_dim} dimensions of a head; supported: all"
            )
        ids = {
            name: self.metadata.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "eot", "padding")
        }
        ends = [i for i in dict.fromkeys((ids["eos"], ids["eot"])) if i is not None]
        config = {
            "model_type": model_type,
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._setting("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._setting("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._setting("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": self._rope(),
            "bos_token_id": ids["bos"],
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": ids["padding"],
        }
        window = self.metadata.get(f"{self._architecture}.attention.sliding_window")
        match model_type:
            case "gemma3_text":
                # llama.cpp (src/models/gemma3.cpp) knows the 27B model, which alone divides by
                # hidden size over heads, by its depth.
                config |= {
                    "sliding_window": window,
                    "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
                    "final_logit_softcapping": self.metadata.get("gemma3.final_logit_softcapping"),
                    "attn_logit_softcapping": self.metadata.get("gemma3.attn_logit_softcapping"),
                    "layer_types": [
                        "full_attention" if i % 6 == 5 else "sliding_attention"
                        for i in range(layers)
                    ],
                }
            case "llama":
                config |= {
                    "attention_bias": "blk.0.attn_q.bias" in self._tensors,
                    "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
                }
                if window:
                    # Mistral 7B: the same network with a window.
                    config |= {"model_type": "mistral", "sliding_window": window}
        return config

    def _rope(self) -> dict[str, Any]:
        theta = self._setting("rope.freq_base", 10_000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        scaling = self._setting("rope.scaling.type", "none")
        if scaling not in ("none", "linear", "yarn"):
            raise ModelError(
                f"{self._path} scales its rotary embeddings by {scaling!r}; supported: linear, yarn"
            )
        if scaling != "none":
            rope |= {"rope_type": scaling, "factor": self._setting("rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = self._setting(
                "rope.scaling.original_context_length", self._setting("context_length")
            )
        if self._architecture != "gemma3":
            return rope
        local = self._setting("rope.freq_base_swa", 10_000.0)
        return {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }

    def tokenizer(self) -> Any:
        """Build the tokenizer, with the chat template if the file has one."""
        try:
            return build_tokenizer(self.metadata)
        except (KeyError, IndexError, ModelError) as error:
            raise ModelError(f"the tokenizer of {self._path} can not be built: {error}") from error

    def weights(self, dtype: torch.dtype) -> dict[str, _Weight]:
        """Return the weights by the names that transformers gives them.

        Each is dequantized when it is asked for, so that there is never a second copy of all.
        """
        gemma = self._architecture == "gemma3"
        modules = _GEMMA_MODULES if gemma else _MODULES
        # llama.cpp interleaves the two halves that a rotation mixes.
        interleaved = {}
        if self._architecture == "llama":
            heads = self._setting("attention.head_count")
            key_heads = self._setting("attention.head_count_kv", heads)
            interleaved = {"attn_q": heads, "attn_k": key_heads}
        weights = {}
        for name, tensor in self._tensors.items():
            if name == _ROPE_FACTORS:
                continue
            path, _, suffix = name.rpartition(".")
            block, _, module = path.rpartition(".")
            prefix = f"model.layers.{block.removeprefix('blk.')}." if block else ""
            # An unknown tensor keeps its name, and is reported as one that has no place.
            known = f"{prefix}{modules[module]}.{suffix}" if module in modules else name
            weights[known] = _Weight(
                self._rows(tensor),
                self._gguf.GGMLQuantizationType(tensor.kind),
                self._gguf.dequantize,
                tensor.shape,
                dtype,
                # llama.cpp stores Gemma's norms with the one that they add.
                offset=-1.0 if gemma and module.endswith("norm") else 0.0,
                heads=interleaved.get(module, 0),
            )
        return weights

    def _rows(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        data = np.frombuffer(self._data, np.uint8, self._bytes(tensor), tensor.offset)
        return data.reshape(prod(tensor.shape[:-1]), -1)

    def scale_rotations(self, model: nn.Module) -> None:
        """Divide the rotary frequencies of a loaded model by the factors in the file, if any."""
        tensor = self._tensors.get(_ROPE_FACTORS)
        if tensor is None:
            return
        factors = torch.from_numpy(self._rows(tensor).copy()).view(torch.float32).flatten()
        rotary = model.get_submodule("model.rotary_emb")
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = rotary.get_buffer(name)
            frequencies.div_(factors.to(frequencies.device))


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A tensor that is dequantized when transformers takes it, as from a safetensors file."""

    # The file's bytes, one row for each row of the tensor.
    rows: NDArray[np.uint8]
    kind: Any
    dequantize: Callable[..., NDArray[np.float32]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Added to all values before they are rounded to `dtype`.
    offset: float
    # In each of so many heads pairs of rows are interleaved; 0: they are not.
    heads: int

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, _: Any) -> torch.Tensor:
        rows = len(self.rows)
        values = torch.empty(rows, self.shape[-1], dtype=self.dtype)
        step = max(1, _CHUNK // self.shape[-1])
        for start in range(0, rows, step):
            chunk = self.dequantize(self.rows[start : start + step], self.kind)
            if self.offset:
                chunk = chunk + np.float32(self.offset)
            values[start : start + step] = torch.from_numpy(np.require(chunk, requirements="W"))
        values = values.reshape(self.shape)
        if self.heads:
            pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
            values = pairs.transpose(1, 2).reshape(self.shape)
        return values
