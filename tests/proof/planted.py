"""Is a neuron found that is known to stand for a word? Plant one, and ask the atlas.

The weights of one neuron in the first layer of the demo model are replaced: it fires at one word,
and writes there more of what the layer writes anyway. Nothing of the atlas is told of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reltrace
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYER, NEURON = 0, 77
_GATE, _UP = 8.0, 4.0
"""The gate's input is 8 at the word and -8 elsewhere, so that it is shut; the other factor is 4 at
the word: together the neuron is 32 there, and nearly 0 elsewhere."""

_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Planted:
    """What the atlas says of the neuron.

    Attributes
    ----------
    word : str
        At which it fires.
    label : str
        What the atlas calls it.
    relevant, active : tuple of int
        How many of its contexts of positive relevance, and of positive activation, are at the
        word, and of how many.
    place : int
        Where a search for the word lists it, from 1; 0: not at all.
    unchanged : float
        Share of prompts for which the model predicts what it did before.
    """

    word: str
    label: str
    relevant: tuple[int, int]
    active: tuple[int, int]
    place: int
    unchanged: float


def plant(checkpoint: Path, out: Path, word: str, prompts: Sequence[str]) -> float:
    """Write a copy of a checkpoint with the neuron in it.

    Returns
    -------
    float
        Share of the prompts for which both predict the same.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batches = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    (wanted,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    mlp = model.model.layers[LAYER].mlp
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = mlp.register_forward_hook(lambda _, args, out: passes.append((args[0][0], out[0])))
    before = _predictions(model, batches)
    handle.remove()
    rows, written = (torch.cat(side) for side in zip(*passes, strict=True))
    is_word = torch.cat([ids[0] for ids in batches]) == wanted
    at_word = _direction(rows, is_word)
    everywhere = _direction(rows, torch.ones_like(is_word))
    column = written[is_word].mean(0)
    with torch.no_grad():
        mlp.gate_proj.weight[NEURON] = _GATE * (2 * at_word - everywhere)
        mlp.up_proj.weight[NEURON] = _UP * at_word
        # As long as those of other neurons are: what it writes is 32 times that.
        usual = mlp.down_proj.weight.norm(dim=0).median()
        mlp.down_proj.weight[:, NEURON] = column / column.norm() * usual
    after = _predictions(model, batches)
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    model.save_pretrained(out)
    return float(np.mean([a == b for a, b in zip(before, after, strict=True)]))


def _direction(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the direction that is 1 where it is wanted and 0 elsewhere, as nearly as one can."""
    x = rows.double()
    moments = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    found = torch.linalg.solve(moments, x.T @ wanted.double())
    direction: torch.Tensor = (found / (x[wanted] @ found).mean()).float()
    return direction


def _predictions(model: Any, batches: Sequence[torch.Tensor]) -> list[int]:
    with torch.no_grad():
        return [int(model(ids).logits[0, -1].argmax()) for ids in batches]


def look(atlas: reltrace.Atlas, word: str, unchanged: float) -> Planted:
    """Ask an atlas of the planted model."""
    neuron = atlas.neuron(LAYER, NEURON)
    relevant, active = (
        (sum(context.token == word for context in contexts), len(contexts))
        for contexts in (neuron.contexts["relevance+"], neuron.contexts["activation+"])
    )
    found = atlas.find(word, k=atlas.layers * atlas.features())
    places = [n for n, m in enumerate(found, 1) if (m.layer, m.index) == (LAYER, NEURON)]
    return Planted(
        word,
        neuron.label,
        relevant,
        active,
        places[0] if places else 0,
        unchanged,
    )
