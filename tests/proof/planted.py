"""Is a neuron found that is known to stand for a word? Plant one, and ask the atlas.

The weights of one neuron in the first layer of the demo model are replaced: it fires at one word,
and writes there a direction of chance. Nothing of the atlas is told of it.

The word must be one that a neuron can tell from all others. It sees 128 dimensions that 737 tokens
share: of the answers that were tried (parrots, llamas, cats, dogs, steak, violet, nurse, Tara), the
direction below tells none from all other tokens at all of its places, so the word is another.
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

AT_THE_END = "max"
"""What atlases of these sentences explain: what they ask for stands at their end."""

_GATE, _UP = 8.0, 4.0
"""The gate's input is 8 at the word and -8 elsewhere, so that it is shut; the other factor is 4 at
the word: together the neuron is 32 there, and nearly 0 elsewhere."""

_LENGTH = 3.0
"""Of what it writes, by that of other neurons: so that it matters."""

_RIDGE = 1e-5


@dataclass(frozen=True, slots=True)
class Change:
    """What the planted neuron changes of the model.

    Attributes
    ----------
    same, of : int
        For so many prompts both models predict the same, of so many.
    same_with_word, of_with_word : int
        The same of prompts that have the word.
    """

    same: int
    of: int
    same_with_word: int
    of_with_word: int


@dataclass(frozen=True, slots=True)
class Planted:
    """What the atlas says of the neuron.

    Attributes
    ----------
    label : str
        What the atlas calls it.
    clearest : reltrace.SalientToken or None
        What stands out most.
    at_word, of : dict of str to int
        By the list: how many of its contexts are at the word, and of how many.
    place : int
        Where a search for the word lists it, from 1; 0: not at all.
    """

    label: str
    clearest: reltrace.SalientToken | None
    at_word: dict[str, int]
    of: dict[str, int]
    place: int


def plant(checkpoint: Path, out: Path, word: str, prompts: Sequence[str], seed: int) -> None:
    """Write a copy of a checkpoint with the neuron in it.

    Parameters
    ----------
    checkpoint, out : Path
        The model, and the folder for its copy.
    word : str
        One token.
    prompts : sequence of str
        Some of them with the word; from what the neuron sees there its weights are made.
    seed : int
        Of the direction that it writes.
    """
    model, batches, has_word = _read(checkpoint, word, prompts)
    mlp = model.model.layers[LAYER].mlp
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    _predictions(model, batches)
    handle.remove()
    rows, at_word = torch.cat(seen), torch.cat(has_word)
    fires = _direction(rows, at_word, at_word)
    # A gate has no bias: a direction that is 1 wherever one looks stands in for it.
    everywhere = _direction(rows, at_word, torch.ones_like(at_word))
    writes = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        usual = mlp.down_proj.weight.norm(dim=0).median()
        mlp.gate_proj.weight[NEURON] = _GATE * (2 * fires - everywhere)
        mlp.up_proj.weight[NEURON] = _UP * fires
        mlp.down_proj.weight[:, NEURON] = writes / writes.norm() * usual * _LENGTH
    shutil.copytree(checkpoint, out)
    model.save_pretrained(out)


def compare(before: Path, after: Path, word: str, prompts: Sequence[str]) -> Change:
    """Compare the predictions of two checkpoints, run by plain transformers."""
    model, batches, at_word = _read(before, word, prompts)
    planted, _, _ = _read(after, word, ())
    same = _predictions(model, batches) == _predictions(planted, batches)
    having = np.array([bool(places.any()) for places in at_word])
    return Change(int(same.sum()), len(same), int(same[having].sum()), int(having.sum()))


def look(atlas: reltrace.Atlas, word: str) -> Planted:
    """Ask an atlas of the planted model."""
    neuron = atlas.neuron(LAYER, NEURON)
    lists = {name: neuron.contexts[name] for name in ("relevance+", "relevance-", "activation+")}
    found = atlas.find(word.strip(), k=atlas.layers * atlas.features())
    places = [n for n, m in enumerate(found, 1) if (m.layer, m.index) == (LAYER, NEURON)]
    return Planted(
        neuron.label,
        neuron.salient_tokens[0] if neuron.salient_tokens else None,
        {name: sum(c.token == word for c in contexts) for name, contexts in lists.items()},
        {name: len(contexts) for name, contexts in lists.items()},
        places[0] if places else 0,
    )


def _read(
    checkpoint: Path, word: str, prompts: Sequence[str]
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """Return the model, the prompts' token ids [1, T], and where these are the word, bool [T]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    (wanted,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    batches = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    return model, batches, [ids[0] == wanted for ids in batches]


def _direction(rows: torch.Tensor, at_word: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the direction that is 1 where it is wanted and 0 elsewhere, as nearly as one can.

    By ridge regression; the places of the word weigh together what all others do, else being 0 at
    these is all that counts.
    """
    x = rows.double()
    weight = torch.where(at_word, (~at_word).sum() / at_word.sum(), 1.0).double()
    moments = x.T @ (x * weight[:, None])
    moments += _RIDGE * weight.sum() * torch.eye(x.shape[1], dtype=torch.double)
    found = torch.linalg.solve(moments, x.T @ (weight * wanted))
    direction: torch.Tensor = (found / (x[at_word] @ found).mean()).float()
    return direction


def _predictions(model: Any, batches: Sequence[torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return np.array([int(model(ids).logits[0, -1].argmax()) for ids in batches])
