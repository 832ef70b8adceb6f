"""Small random checkpoints of every family, for tests: real config, weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SENTENCES = (
    "I have 5 cats and 3 dogs. My cats love to play with my dogs.",
    "The quick brown fox jumps over the lazy dog near the quiet river bank.",
    "Relevance flows from the logit back through every layer to the first token.",
    "My sister has two birds and a fish. The birds sing all day, the fish is silent.",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a random checkpoint looks like."""

    seed: int = 0
    layers: int = 3
    hidden_size: int = 48
    heads: int = 4
    key_value_heads: int = 4
    intermediate_size: int = 80
    vocab_size: int = 320
    context_length: int = 128
    tied: bool = False
    llama3_rope: bool = False
    family: str = "llama"
    head_dim: int | None = None
    sliding_window: int | None = None
    biases: float = 0.0
    logit_softcap: float | None = None


PLAIN = Recipe()
GROUPED = Recipe(seed=1, key_value_heads=2, layers=4)
TIED = Recipe(seed=2, tied=True)
# The scaled range must begin inside the prompts that tests use: an original context of 32.
LLAMA3_ROPE = Recipe(seed=3, llama3_rope=True, heads=6, key_value_heads=2)

DEEP = Recipe(seed=4, layers=12)

# Their windows end inside the longest prompt of the tests, and not on a multiple of it.
MISTRAL = Recipe(seed=5, family="mistral", key_value_heads=2, head_dim=16, sliding_window=20)
QWEN2 = Recipe(seed=6, family="qwen2", key_value_heads=2, sliding_window=20, biases=0.3)
QWEN2_UNBIASED = replace(QWEN2, biases=0.0)
QWEN3 = Recipe(seed=7, family="qwen3", key_value_heads=2, head_dim=16, sliding_window=20)
GEMMA3 = Recipe(
    seed=8, family="gemma3_text", layers=4, key_value_heads=2, head_dim=16, sliding_window=20
)
GEMMA3_SOFTCAP = replace(GEMMA3, seed=9, tied=True, logit_softcap=4.0)
OLMO2 = Recipe(seed=10, family="olmo2", key_value_heads=2)
# The long frequencies begin inside the prompts that tests use.
PHI3 = Recipe(seed=11, family="phi3", key_value_heads=2, sliding_window=20)
# Of its four layers the last has no rotary embeddings, and a window.
SMOLLM3 = Recipe(seed=12, family="smollm3", layers=4, key_value_heads=2, sliding_window=20)

RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "grouped": GROUPED,
    "tied": TIED,
    "llama3_rope": LLAMA3_ROPE,
    "deep": DEEP,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen2_unbiased": QWEN2_UNBIASED,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "gemma3_softcap": GEMMA3_SOFTCAP,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
}

LXT_RECIPES = ("mistral", "qwen2", "qwen3", "gemma3", "gemma3_softcap", "smollm3")
"""The families besides llama that lxt has maps for, or that have LLaMA's modules."""

FAMILY_RECIPES = (*LXT_RECIPES, "olmo2", "phi3")
"""The families besides llama, as they are."""


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a few sentences; ids end below `vocab_size`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the config of a recipe."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if recipe.llama3_rope:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    fields: dict[str, Any] = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "max_position_embeddings": recipe.context_length,
        "tie_word_embeddings": recipe.tied,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if recipe.head_dim is not None:
        fields["head_dim"] = recipe.head_dim
    # The first layer sees everything, the others through the window.
    window = {"use_sliding_window": True, "max_window_layers": 1}
    match recipe.family:
        case "llama":
            return LlamaConfig(**fields)
        case "mistral":
            return MistralConfig(**fields, sliding_window=recipe.sliding_window)
        case "qwen2":
            return Qwen2Config(**fields, **window, sliding_window=recipe.sliding_window)
        case "qwen3":
            return Qwen3Config(**fields, **window, sliding_window=recipe.sliding_window)
        case "gemma3_text":
            local = {"rope_type": "default", "rope_theta": 100.0}
            return Gemma3TextConfig(
                **fields
                | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}},
                sliding_window=recipe.sliding_window,
                layer_types=[
                    "full_attention" if i % 3 == 2 else "sliding_attention"
                    for i in range(recipe.layers)
                ],
                query_pre_attn_scalar=9,
                final_logit_softcapping=recipe.logit_softcap,
            )
        case "olmo2":
            return Olmo2Config(**fields)
        case "phi3":
            longrope = {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 2.0, 4.0],
            }
            return Phi3Config(
                **fields | {"rope_parameters": longrope},
                original_max_position_embeddings=40,
                pad_token_id=None,
                sliding_window=recipe.sliding_window,
            )
        case "smollm3":
            return SmolLM3Config(
                **fields,
                pad_token_id=None,
                use_sliding_window=True,
                sliding_window=recipe.sliding_window,
            )
    raise ValueError(f"no family {recipe.family!r}")


def build_model(recipe: Recipe) -> PreTrainedModel:
    """Return a model in float32 with seeded weights, large enough that no layer is near linear."""
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(build_config(recipe))
    gemma = recipe.family == "gemma3_text"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Gemma's norms multiply by one plus their weight.
                parameter.uniform_(-0.3, 0.3) if gemma else parameter.uniform_(0.7, 1.3)
            elif "bias" in name:
                parameter.normal_(0.0, recipe.biases)
            elif "embed_tokens" in name or "lm_head" in name:
                # Gemma scales its embeddings by the root of the hidden size.
                parameter.normal_(0.0, 0.15 if gemma else 0.5)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def save_checkpoint(folder: Path, recipe: Recipe = PLAIN, **changes: Any) -> Path:
    """Write a checkpoint (safetensors, config, tokenizer) to `folder` and return it.

    `changes` are fields of the recipe that differ, for example ``layers=8``.
    """
    recipe = replace(recipe, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    build_model(recipe).save_pretrained(folder)
    build_tokenizer(recipe.vocab_size).save_pretrained(folder)
    return folder
