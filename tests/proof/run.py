"""The proofs at full size: rules, ablation, steering, a corpus over workers, a planted neuron.

Starts services of its own for the demo model, for models with a planted neuron, and for SmolLM2.

    python tests/proof/run.py              # several minutes on two cores
    python tests/proof/run.py --only demo  # or real: the real models
    python tests/proof/run.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reltrace
from bench.service import serving
from demo_model.corpus import held_out
from proof import real
from proof.ablation import Ablation, ablate
from proof.planted import AT_THE_END, LAYER, NEURON, Change, Planted, compare, look, plant
from proof.rules import Judged, judge
from proof.split import Split, split
from proof.steering import Steering, steer, unseen
from reltrace_worker.demo import path as demo_path
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

WORD = " lunch"
# Seeds: of the corpus of atlases, of the prompts of rules, ablation and steering, of what planted
# neurons are made from, and of what is drawn.
CORPUS, PROMPTS, MADE_FROM, CHANCE = 9, 77, 5, 0

_JUDGED = 100
"""Sentences that rules are judged by."""

_COMPARED = 2_000
"""Sentences for which predictions are compared."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; `was` is the label that the planted neuron's place had before.

    One neuron is planted after another: `change` and `planted` have an entry for each.
    """

    rules: list[Judged]
    ablation: list[Ablation]
    steering: list[Steering]
    split: Split
    was: str
    change: list[Change]
    planted: list[Planted]


@dataclass(frozen=True, slots=True)
class Reports:
    """What was found on the demo model, and on real ones; None where that was left out."""

    demo: Report | None
    real: real.RealReport | None


def prove(sentences: int, prompts: int, made_from: int, directions: int, progress: bool) -> Report:
    """Prove all five."""
    corpus = held_out(sentences, CORPUS)
    texts = [example.prompt for example in corpus]
    ablated = [example.prompt for example in held_out(prompts, PROMPTS)]
    making = [example.prompt for example in held_out(made_from, MADE_FROM)]
    checkpoint = demo_path()
    with tempfile.TemporaryDirectory() as scratch:
        with serving("demo", RELTRACE_THREADS="2") as address, reltrace.Client(address) as client:
            rules = judge(client, held_out(_JUDGED, PROMPTS), CHANCE)
            ablation = ablate(client, str(checkpoint), ablated, (8, 32), CHANCE)
            atlas = client.build_atlas(
                texts, Path(scratch) / "atlas", target=AT_THE_END, progress=progress
            )
            was = atlas.label(LAYER, NEURON)
            answers = {example.answer for example in corpus}
            others = unseen(corpus, 400, PROMPTS)
            steering = steer(client, atlas, answers, others, (1, 2, 4), CHANCE)
        three = serving("demo", RELTRACE_THREADS="1", RELTRACE_WORKERS="3")
        with three as address:
            one, out = Path(scratch) / "atlas", Path(scratch) / "split"
            parted = split(address, texts, one, out, progress)
        change, found = [], []
        for seed in range(CHANCE, CHANCE + directions):
            planted = Path(scratch) / f"planted-{seed}"
            plant(checkpoint, planted, WORD, making, seed)
            change.append(compare(checkpoint, planted, WORD, texts[:_COMPARED]))
            with (
                serving(planted, RELTRACE_THREADS="2") as address,
                reltrace.Client(address) as client,
            ):
                atlas = client.build_atlas(
                    texts, Path(scratch) / f"atlas-{seed}", target=AT_THE_END, progress=progress
                )
                found.append(look(atlas, WORD))
    return Report(rules, ablation, steering, parted, was, change, found)


def show(report: Report) -> None:
    """Print it for people."""
    table = Table(title="Proofs, measured on the demo model (mean ± half of the 95 % interval)")
    for column in ("proof", "what", "figure"):
        table.add_column(column, overflow="fold")
    for judged in report.rules:
        table.add_row(judged.rule, "area between curves, tokens off", str(judged.tokens))
        table.add_row("", "neurons off", str(judged.neurons))
        table.add_row("", "the answer is the most relevant token", f"{judged.hit.mean:.0%}")
        table.add_row("", "positive relevance on it", f"{judged.mass.mean:.0%}")
        table.add_section()
    for one in report.ablation:
        first = f"{one.neurons} neurons off"
        for way, moved in one.moved.items():
            table.add_row(first, f"by {way}: logit moves (falls)", f"{moved} ({one.fell[way]})")
            first = ""
        for by, more in (("relevance", one.more), ("size", one.size_more)):
            for way, mean in more.items():
                table.add_row("", f"{by} moves it further than {way}", str(mean))
        table.add_section()
    for row in report.steering:
        named = f"{row.neurons} neurons, {row.answers} answers"
        table.add_row(f"steered x {row.times:g}", f"{named}: log p rises", str(row.labelled))
        table.add_row("", "with another neuron", str(row.chance))
        table.add_row("", "difference", str(row.more))
        table.add_row("", "difference, over answers", str(row.more_by_answer))
        wins = f"{row.wins.mean:.0%} ± {row.wins.margin:.0%}"
        table.add_row("", "labelled one raises it more", wins)
        factors = f"{row.factor:.2f}, {row.chance_factor:.2f}"
        table.add_row("", "median factor of p: labelled, other", factors)
        table.add_row("", "prompts in which the model then says it", f"{row.says:.2%}")
        table.add_section()
    three = f"{report.split.workers} workers took part"
    table.add_row("corpus split", three, f"{report.split.megabytes:.1f} MB")
    equal = f"{report.split.arrays} of {report.split.of} arrays"
    table.add_row("", "equal to one worker's, bit for bit", equal)
    table.add_section()
    for found, change in zip(report.planted, report.change, strict=True):
        table.add_row("planted", f"label ({report.was!r} before)", repr(found.label))
        for name, count in found.at_word.items():
            table.add_row("", f"contexts of {name} at {WORD!r}", f"{count} of {found.of[name]}")
        table.add_row("", "place in a search for it", str(found.place))
        table.add_row("", "predictions unchanged", f"{change.same} of {change.of}")
        unchanged = f"{change.same_with_word} of {change.of_with_word}"
        table.add_row("", f"of prompts with {WORD!r}", unchanged)
        table.add_section()
    Console(width=110).print(table)


def show_real(report: real.RealReport) -> None:
    """Print it for people."""
    table = Table(title="Proofs, measured on real models (mean ± half of the 95 % interval)")
    for column in ("proof", "what", "figure"):
        table.add_column(column, overflow="fold")
    for row in real.rows(report):
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    Console(width=140).print(table)


def main() -> None:
    """Prove, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sentences", type=int, default=20_000, help="of the atlases")
    parser.add_argument("--prompts", type=int, default=200, help="that are ablated")
    parser.add_argument("--made-from", type=int, default=6_000, help="for planted neurons")
    parser.add_argument("--directions", type=int, default=3, help="neurons that are planted")
    parser.add_argument("--only", choices=("demo", "real"), help="models; default: all")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    of_demo = of_real = None
    if given.only != "real":
        of_demo = prove(
            given.sentences, given.prompts, given.made_from, given.directions, not given.json
        )
    if given.only != "demo":
        with tempfile.TemporaryDirectory() as scratch:
            of_real = real.prove(Path(scratch), CHANCE, not given.json)
    if given.json:
        print(json.dumps(asdict(Reports(of_demo, of_real))))
        return
    if of_demo is not None:
        show(of_demo)
    if of_real is not None:
        show_real(of_real)


if __name__ == "__main__":
    main()
