"""Countries and their capitals: what a language model knows, and where the prompt says it.

The country's name is what the prediction rests on: of all tokens it alone tells the answer. Which
rule knows that, and whether it depends on what takes the place of tokens:

    python tests/proof/capitals.py --server HOST:PORT       # that serves SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import reltrace
from reltrace.evaluation.evaluation import table, verdict

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"replace": "mean"},
    {"replace": " "},
    {"site": "neuron"},
    # What can not be trusted, and is warned of.
    {"measure": "logit", "keep": "none"},
)
"""Arguments of `evaluate`, beside its defaults."""

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Poland": "Warsaw",
    "Russia": "Moscow",
    "Ukraine": "Kiev",
    "Turkey": "Ankara",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "England": "London",
    "Scotland": "Edinburgh",
    "Belgium": "Brussels",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
}


def predicted() -> list[dict[str, Any]]:
    """Return prompts whose target is what the model predicts."""
    return [
        {
            "id": country,
            "prompt": f"<|endoftext|>The capital of {country} is the city of",
            "answer": country,
        }
        for country in CAPITALS
    ]


def told() -> list[dict[str, Any]]:
    """Return prompts whose target is the capital, of however many tokens."""
    return [
        {
            "id": country,
            "prompt": f"<|endoftext|>The capital of {country} is",
            "target": f" {capital}",
            "answer": country,
        }
        for country, capital in CAPITALS.items()
    ]


def judge(client: reltrace.Client) -> Iterator[tuple[str, reltrace.Evaluation]]:
    """Evaluate all rules on both kinds of prompts, in every setting.

    Parameters
    ----------
    client : reltrace.Client
        Of a service that serves a model with the special token "<|endoftext|>".

    Yields
    ------
    (str, Evaluation)
        Which prompts, and what was found.
    """
    for kind, prompts in (("predicted", predicted()), ("told", told())):
        for setting in SETTINGS:
            yield kind, client.evaluate(prompts, progress=True, **setting)


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server")
    with reltrace.Client(parser.parse_args().server) as client:
        for kind, found in judge(client):
            print(f"\n{kind}: {found.title}")
            titles, rows = table(found)
            for row in (titles, *rows):
                print("".join(f"{cell:28}" for cell in row))
            print(verdict(found))
            for warning in found.warnings:
                print(f"warning: {warning}")
            for key, error in found.failures.items():
                print(f"{key} failed: {error}")


if __name__ == "__main__":
    main()
