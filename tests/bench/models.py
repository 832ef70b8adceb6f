"""Models with random weights of a given shape, or real ones, and prompts for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from reference.checkpoints import build_tokenizer
from reltrace_worker.models.families import FAMILIES
from reltrace_worker.models.loading import LoadedModel, ModelShape, load_model
from reltrace_worker.session.model_sources import SMOLLM2, smollm2_path
from reltrace_worker.types.jobs import (
    Target,
    Term,
    TokenizedPrompt,
    TraceJob,
)
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a LLaMA."""

    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocab_size: int


SHAPES: dict[str, Shape] = {
    "tiny": Shape(3, 48, 6, 2, 96, 320),
    "135m": Shape(30, 576, 9, 3, 1536, 49_152),
    "360m": Shape(32, 960, 15, 5, 2560, 49_152),
    "1b": Shape(16, 2048, 32, 8, 8192, 128_256),
    "8b": Shape(32, 4096, 32, 8, 14_336, 128_256),
}


def build(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LoadedModel:
    """Return a model with seeded weights, scaled as trained ones are at initialisation."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    module: torch.nn.Module = model
    module.to(dtype).requires_grad_(False).eval()
    return LoadedModel(
        model=model,
        tokenizer=build_tokenizer(min(shape.vocab_size, 320)),
        name="random",
        revision=f"seed-{seed}",
        family=FAMILIES["llama"],
        shape=ModelShape(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
        ),
        dtype=dtype,
        device=next(model.parameters()).device,
        context_length=config.max_position_embeddings,
        parameters=model.num_parameters(),
    )


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> LoadedModel:
    """Return a shape's model with random weights, or a real one as the worker's `--model`."""
    if name in SHAPES:
        return build(SHAPES[name], dtype, device)
    path = str(smollm2_path()) if name == SMOLLM2 else name
    return load_model(path, device=device, dtype=str(dtype).removeprefix("torch."))


def prompts_for(
    loaded: LoadedModel, count: int, shortest: int, longest: int, seed: int = 0
) -> list[list[int]]:
    """Return prompts as `prompts`: random ids for random weights, English text for real ones."""
    drawn = prompts(count, shortest, longest, loaded.shape.vocab_size, seed)
    if loaded.name == "random":
        return drawn
    # The manual that comes with Python, from a paragraph on.
    paragraphs = [part for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    choose = random.Random(seed)
    texts = []
    for ids in drawn:
        start = choose.randrange(len(paragraphs) - len(ids))
        text = " ".join(" ".join(paragraphs[start : start + len(ids)]).split())
        texts.append(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)])
    return texts


def prompts(
    count: int, shortest: int, longest: int, vocab_size: int, seed: int = 0
) -> list[list[int]]:
    """Return `count` prompts of token ids, lengths drawn evenly from `shortest` to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def job(ids: list[int], rule: str = "attnlrp", sites: tuple[str, ...] = ("resid",)) -> TraceJob:
    """Return a job that traces the largest logit at the last position, reduced to tokens."""
    target = Target((Term(len(ids) - 1, None),))
    return TraceJob(TokenizedPrompt(tuple(ids), tuple(map(str, ids))), (target,), sites, rule=rule)
