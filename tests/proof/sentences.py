"""Plain English for the proofs on real models: beginnings of sentences, written for them."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = "I have 5 cats and 3 dogs. My cats love to play with my"
"""The sentence of LXT's page."""

SENTENCES = (EXAMPLE, *Path(__file__).with_name("sentences.txt").read_text("utf-8").splitlines())
"""The example, and forty more; what comes next is left to the model."""
