"""Small random LLaMA checkpoints on disk, for tests: real config, weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


PLAIN = Recipe()
GROUPED = Recipe(seed=1, key_value_heads=2, layers=4)
TIED = Recipe(seed=2, tied=True)
# The scaled range must begin inside the prompts that tests use: an original context of 32.
LLAMA3_ROPE = Recipe(seed=3, llama3_rope=True, heads=6, key_value_heads=2)

DEEP = Recipe(seed=4, layers=12)

RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "grouped": GROUPED,
    "tied": TIED,
    "llama3_rope": LLAMA3_ROPE,
    "deep": DEEP,
}


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


def build_config(recipe: Recipe) -> LlamaConfig:
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
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=recipe.tied,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
    )


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a model in float32 with seeded weights, large enough that no layer is near linear."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(build_config(recipe))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.5)
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
