"""Countries and their capitals: what a language model knows, and where the prompt says it.

The country's name is what the prediction rests on: of all tokens it alone tells the answer.
"""

from __future__ import annotations

from typing import Any

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
