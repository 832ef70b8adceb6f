"""Checkpoints that hold images too: their text part loads, and says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.checkpoints import GEMMA3, build_config, build_model, build_tokenizer
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.models import load_model
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import TraceRequest
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint around the weights of the recipe "gemma3"."""
    folder = tmp_path_factory.mktemp("text_part") / "multimodal"
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    whole: Any = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=build_config(GEMMA3).to_dict(),
            vision_config=vision.to_dict(),
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        )
    )
    text: Any = build_model(GEMMA3)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(folder)
    build_tokenizer(GEMMA3.vocab_size).save_pretrained(folder)
    return folder


def test_the_text_part_gives_the_numbers_of_the_text_model(
    checkpoints: Checkpoints, folder: Path
) -> None:
    text, part = checkpoints.loaded("gemma3"), load_model(str(folder), dtype="float32")
    assert (part.name, type(part.model).__name__) == ("multimodal", "Gemma3ForCausalLM")
    assert part.model.num_parameters() == text.model.num_parameters()
    assert part.revision.startswith("sha256:")
    spec = TraceRequest(PROMPTS[5], tuple(SITES))
    (ours,), (wanted,) = (run(Engine(m), prepare(m, spec)) for m in (part, text))
    for left, right in zip(ours.tensors, wanted.tensors, strict=True):
        assert torch.equal(left.values, right.values), left.site


def test_a_text_part_that_lacks_weights_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    try:
        tensors = load_file(weights)
        tensors.pop("language_model.model.layers.1.mlp.up_proj.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj"):
            load_model(str(folder))
    finally:
        weights.write_bytes(before)
