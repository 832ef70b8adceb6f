"""Frequencies of rotary embeddings that do not depend on the other prompts of a pass."""

from __future__ import annotations

import pytest
import torch
from reference.checkpoints import PHI3
from reference.loaded import Checkpoints
from reltrace_worker.models import load_model
from reltrace_worker.models.rope import _prompt_lengths
from transformers import AutoModelForCausalLM

ORIGINAL = 40
"""Tokens up to which the recipe "phi3" has the short frequencies of longrope."""


def test_each_token_knows_the_length_of_its_prompt() -> None:
    pack = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert _prompt_lengths(pack).tolist() == [[3, 3, 3, 1, 2, 2]]
    # Padded on the left, and one token of a text that is being written.
    padded = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    assert _prompt_lengths(padded)[:, -1].tolist() == [2, 4]
    assert _prompt_lengths(torch.tensor([[7], [0]])).tolist() == [[8], [1]]


@pytest.mark.parametrize("context", [None, ORIGINAL])
def test_longrope_gives_every_prompt_the_frequencies_that_it_has_alone(
    checkpoints: Checkpoints, context: int | None
) -> None:
    """
    Given prompts at and beyond the length at which transformers changes all frequencies
    If they are in one batch
    I expect cosines and sines that transformers gives each of them alone.
    """
    folder = str(checkpoints.folder("phi3"))
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    loaded = load_model(folder, device="cpu", context=context)
    ours = loaded.model.get_submodule("model.rotary_emb")
    x = torch.zeros(1, 1, PHI3.hidden_size)
    lengths = [n for n in (3, ORIGINAL, ORIGINAL + 1, 70) if n <= loaded.context_length]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for found, *expected in zip(
        ours(x, positions), *(theirs(x, torch.arange(n)[None]) for n in lengths), strict=True
    ):
        assert torch.equal(found, torch.cat(expected, 1))
