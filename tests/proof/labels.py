"""How well labels tell where neurons of a real model are strong, in English that is new to them.

Builds atlases of passages of Debian's package `fortunes` in a folder, and measures the labels; what
is in the folder already is not built again, so that a run that was broken off goes on.

    apt-get install fortunes
    python tests/proof/labels.py OUT --model smollm2              # 100,000 tokens for labels
    python tests/proof/labels.py OUT --model smollm2 --compare    # and what else could be explained
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import reltrace
from bench.service import serving
from proof.detection import Detected, Example, detect
from proof.english import passages
from rich.console import Console
from rich.table import Table

WAYS: dict[str, dict[str, Any]] = {
    "all positions": {},
    "8 positions": {"positions": 8},
    "last position": {"target": "max"},
}
"""What each passage explains."""

LISTS = ("relevance+", "activation+")

CHANCE = 0
"""Seed of the passages' order and of the labels that are drawn."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, by what passages explain; the held-out ones explain all positions."""

    tokens: int
    held_out_tokens: int
    detected: dict[str, list[Detected]]
    examples: dict[str, list[Example]]


def measure(
    address: str, out: Path, count: int, held_out: int, ways: list[str], progress: bool
) -> Report:
    """Build what is missing in a folder, and measure."""
    texts = passages(CHANCE)
    if count + held_out > len(texts):
        raise SystemExit(f"there are {len(texts)} passages, not {count + held_out}")
    with reltrace.Client(address) as client:
        other = client.build_atlas(
            texts[count : count + held_out], out / "held-out", progress=progress
        )
        atlases = {
            way: client.build_atlas(
                texts[:count], out / way.replace(" ", "-"), progress=progress, **WAYS[way]
            )
            for way in ways
        }
    found = {way: detect(atlas, other, LISTS, CHANCE) for way, atlas in atlases.items()}
    return Report(
        atlases[ways[0]].tokens,
        other.tokens,
        {way: detected for way, (detected, _) in found.items()},
        {way: examples for way, (_, examples) in found.items()},
    )


def show(report: Report) -> None:
    """Print it for people."""
    table = Table(
        title=f"Labels of {report.tokens:,} tokens, in {report.held_out_tokens:,} held-out tokens"
    )
    for column in ("explained", "places", "labelled", "area", "chance", "beats", "by chance"):
        table.add_column(column)
    for way, several in report.detected.items():
        for one in several:
            table.add_row(
                way,
                one.places,
                f"{one.labelled.mean:.1%}",
                f"{one.area:.3f}",
                f"{one.by_chance:.3f}",
                f"{one.beats.mean:.1%} ± {one.beats.margin:.1%}",
                f"{one.beats_by_chance.mean:.1%}",
            )
    console = Console(width=120)
    console.print(table)
    for way, examples in report.examples.items():
        console.print(f"\nThe best of different labels, {way}:")
        for one in examples:
            console.print(
                f"layer {one.layer}, neuron {one.neuron}: {one.label!r}, area {one.area:.3f}",
                markup=False,
            )
            for context in one.contexts:
                console.print(f"    {context}", markup=False, highlight=False)


def main() -> None:
    """Build, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2", help="as `reltrace up --model` takes it")
    parser.add_argument("--passages", type=int, default=2410, help="for labels")
    parser.add_argument("--held-out", type=int, default=1000, help="for the places")
    parser.add_argument("--compare", action="store_true", help="with other ways to explain")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    ways = list(WAYS) if given.compare else list(WAYS)[:1]
    with serving(given.model) as address:
        report = measure(address, given.out, given.passages, given.held_out, ways, not given.json)
    if given.json:
        print(json.dumps(asdict(report)))
    else:
        show(report)


if __name__ == "__main__":
    main()
