"""The three proofs at full size: ablation, steering, and a neuron that was planted.

Starts a service of its own for the demo model, and another for the model with the planted neuron.

    python tests/proof/run.py              # about two minutes on two cores
    python tests/proof/run.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reltrace
from bench.service import serving
from proof.ablation import Ablation, ablate
from proof.planted import Planted, look, plant
from proof.steering import Steering, steer
from reltrace_worker.demo import path as demo_path
from reltrace_worker.demo.corpus import held_out
from rich.console import Console
from rich.table import Table

WORD = " lunch"
# Of the corpus of atlases, of the prompts that are ablated and steered, and of what is drawn.
CORPUS, PROMPTS, CHANCE = 9, 77, 0


def main() -> None:
    """Prove, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sentences", type=int, default=20_000, help="of the atlas")
    parser.add_argument("--prompts", type=int, default=200, help="that are ablated")
    parser.add_argument("--planted", type=int, default=2_000, help="sentences of its atlas")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sentences = held_out(given.sentences, CORPUS)
    corpus = [example.prompt for example in sentences]
    examples = held_out(max(given.prompts, 400), PROMPTS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with serving("demo", 2) as address, reltrace.Client(address) as client:
            prompts = [example.prompt for example in examples[: given.prompts]]
            ablations = ablate(client, str(demo_path()), prompts, (8, 32), CHANCE)
            atlas = client.build_atlas(corpus, folder / "atlas", progress=not given.json)
            answers = {example.answer for example in sentences}
            steered = steer(client, atlas, answers, examples, (1, 2, 4), CHANCE)
        some = corpus[: given.planted]
        unchanged = plant(demo_path(), folder / "planted", WORD, some)
        with serving(folder / "planted", 2) as address, reltrace.Client(address) as client:
            found = look(client.build_atlas(some, folder / "found"), WORD, unchanged)
    if given.json:
        print(
            json.dumps(
                {
                    "ablation": [asdict(one) for one in ablations],
                    "steering": [asdict(one) for one in steered],
                    "planted": asdict(found),
                }
            )
        )
    else:
        report(ablations, steered, found)


def report(ablations: list[Ablation], steered: list[Steering], found: Planted) -> None:
    """Print it for people; intervals are of 95 %."""
    console = Console(width=130)
    table = Table(title="Neurons switched off: how far the target's logit moves (and falls)")
    for name in ("neurons", "relevance", "activation", "chance", "more than activation", "chance"):
        table.add_column(name, justify="right")
    for one in ablations:
        table.add_row(
            str(one.neurons),
            *(f"{one.moved[way]} ({one.fell[way].mean:.2f})" for way in one.moved),
            *(str(more) for more in one.more.values()),
        )
    console.print(table)
    table = Table(title="Steering: log-probability of the label's answer; factor of probability")
    columns = ("times", "neurons", "labelled", "chance", "more", "wins", "factor", "chance")
    for name in columns:
        table.add_column(name, justify="right")
    for row in steered:
        table.add_row(
            f"{row.times:g}", str(row.neurons), str(row.labelled), str(row.chance), str(row.more),
            f"{row.wins:.0%}", f"{row.factor:.2f}", f"{row.chance_factor:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Planted for {found.word!r}: labelled {found.label!r}; at the word are "
        f"{found.relevant[0]} of {found.relevant[1]} contexts by relevance and {found.active[0]} "
        f"of {found.active[1]} by activation; place {found.place} of a search for it; "
        f"{found.unchanged:.1%} of predictions unchanged"
    )


if __name__ == "__main__":
    main()
