"""Train the demo model: ``python -m demo_model.train``.

Builds the tokenizer, trains a small LLaMA on texts of :mod:`demo_model.corpus`, saves
both, reads them back as the worker does, measures them on held-out sentences and writes the
model card beside them. One seed gives one model on one kind of machine; other processors and
other versions of torch round differently and give a model that differs in its last bits.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from reltrace_worker import demo
from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.models import load_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model import card, corpus, tokenizer
from demo_model.corpus import Document
from demo_model.measure import measure

CONTEXT = 512
HELD_OUT_SENTENCES = 1800
HELD_OUT_SEED = 1
_REPORT_EVERY = 50


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the training depends on, next to the corpus.

    Parameters
    ----------
    seed
        Of the first weights and of the training texts.
    steps
        Optimizer steps.
    batch
        Texts per step.
    rehearsal_steps
        Steps at the beginning that see rehearsals only.
    matrix_rate, other_rate
        Largest learning rate of Muon (the layers' matrices) and AdamW (embeddings and norms);
        both rise over `warmup` steps and fall along a half cosine.
    warmup
        Steps.
    filler_weight
        Weight in the loss of a token that can not be foretold; an answer weighs 1.
    embedding_std
        Standard deviation of the first embeddings.
    """

    seed: int = 0
    steps: int = 1400
    batch: int = 32
    rehearsal_steps: int = 300
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup: int = 100
    filler_weight: float = 0.02
    embedding_std: float = 0.03


_DEFAULT = Recipe()


def architecture(vocabulary: int) -> LlamaConfig:
    """Give the demo model's shape for a vocabulary of that many tokens."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
    )


def train(recipe: Recipe, encode: Any, vocabulary: int) -> LlamaForCausalLM:
    """Train a model from nothing.

    Parameters
    ----------
    recipe
        How.
    encode
        The tokenizer.
    vocabulary
        Its number of tokens.

    Returns
    -------
    LlamaForCausalLM
        float32, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    # Any: transformers' own annotations do not hold under mypy's strict mode.
    model: Any = LlamaForCausalLM(architecture(vocabulary))
    nn.init.normal_(model.get_input_embeddings().weight, std=recipe.embedding_std)
    optimizers = _optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers
    ]
    model.train()
    started = time.monotonic()
    for step, documents in enumerate(_batches(recipe), start=1):
        ids, weights = _tensors(documents, encode, recipe.filler_weight)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % _REPORT_EVERY == 0:
            seconds = time.monotonic() - started
            typer.echo(f"step {step}/{recipe.steps}  loss {loss.item():.3f}  {seconds:.0f} s")
    trained: LlamaForCausalLM = model.eval()
    return trained


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_layer = parameter.dim() == 2 and "embed_tokens" not in name
        (matrices if in_layer else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def _rate(step: int, recipe: Recipe) -> float:
    rise = min(1.0, (step + 1) / recipe.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    return rise * (0.02 + 0.98 * fall)


def _batches(recipe: Recipe) -> Iterator[Sequence[Document]]:
    stream = corpus.training(recipe.seed, rehearsals_first=recipe.rehearsal_steps * recipe.batch)
    for _ in range(recipe.steps):
        yield tuple(itertools.islice(stream, recipe.batch))


def _tensors(
    documents: Sequence[Document], encode: Any, filler_weight: float
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] int64, padded at the end, and loss weights [B, T] float32."""
    encoded = encode([document.text for document in documents])
    longest = max(len(ids) for ids in encoded.input_ids)
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    weights = torch.zeros(len(documents), longest)
    for row, (document, tokens) in enumerate(zip(documents, encoded.input_ids, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(tokens)] = filler_weight
        for start, _ in document.answers:
            weights[row, encoded.char_to_token(row, start)] = 1.0
    return ids, weights


def _shape(config: Any) -> str:
    return (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads with {config.num_key_value_heads} key-value heads, "
        f"{config.intermediate_size} neurons per layer, tied embeddings"
    )


def main(
    out: Annotated[
        Path, typer.Option(help="Folder to write; it is made, and files in it are replaced.")
    ] = Path(demo.__file__).parent / "weights",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the weights and of the texts.")
    ] = _DEFAULT.seed,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = _DEFAULT.steps,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
) -> None:
    """Train the demo model, save it, measure it and write its model card."""
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, steps=steps)
    encode = tokenizer.build(CONTEXT)
    started = time.monotonic()
    model: Any = train(recipe, encode, len(encode))
    seconds = time.monotonic() - started

    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(encode, out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone

    # What is measured is what was saved: read back, rounded to bfloat16.
    loaded = load_model(str(out), dtype="float32", device="cpu", name=DEMO_MODEL)
    outcomes = measure(loaded, corpus.held_out(HELD_OUT_SENTENCES, HELD_OUT_SEED))
    [shown] = measure(loaded, [corpus.example()])
    facts = card.Facts(
        seed=seed,
        steps=steps,
        batch=recipe.batch,
        threads=threads,
        rehearsal_steps=recipe.rehearsal_steps,
        seconds=seconds,
        parameters=model.num_parameters(),
        vocabulary=len(encode),
        context=CONTEXT,
        shape=_shape(model.config),
        held_out_seed=HELD_OUT_SEED,
    )
    text = card.write(facts, outcomes, shown)
    (out / "README.md").write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
