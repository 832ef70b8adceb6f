"""The demo model's card: what it is, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reltrace_worker.demo import DEMO_MODEL

from demo_model.measure import Outcome, Score, by_family, score


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card says about the training run.

    Parameters
    ----------
    seed, steps, batch, threads
        As given to the training; `batch` in texts.
    rehearsal_steps
        Steps at the beginning that saw rehearsals only.
    seconds
        Wall-clock time of the training.
    parameters
        Number of the model's weights, tied ones counted once.
    vocabulary, context
        Tokens.
    shape
        One line: layers, widths, heads.
    held_out_seed
        Seed of the sentences that were measured.
    """

    seed: int
    steps: int
    batch: int
    threads: int
    rehearsal_steps: int
    seconds: float
    parameters: int
    vocabulary: int
    context: int
    shape: str
    held_out_seed: int


def write(facts: Facts, outcomes: Sequence[Outcome], shown: Outcome) -> str:
    """Write the card as Markdown.

    Parameters
    ----------
    facts
        About the training run.
    outcomes
        Of held-out sentences.
    shown
        Of the example sentence.
    """
    whole = score(outcomes)
    rows = [_row("**all**", whole)]
    rows += [_row(name, part) for name, part in by_family(outcomes).items()]
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.example.family, outcome)
    samples = [f"| {name} | {o.example.prompt} | {o.example.answer} |" for name, o in first.items()]
    located = "does" if shown.located else "does not"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {DEMO_MODEL}

A LLaMA with {facts.parameters:,} weights, trained for one task: the word that comes next occurs
earlier in the prompt, and the model has to find it. It ships with reltrace so that a trained
model can be traced and tested without a download.

| | |
|---|---|
| architecture | LlamaForCausalLM: {facts.shape} |
| vocabulary | {facts.vocabulary:,} tokens: bytes and the whole words of the corpus |
| context | {facts.context} tokens; the training texts are far shorter |
| weights | bfloat16, safetensors |

After "{shown.example.prompt}" it predicts "{shown.predicted}". Sentences with cats and dogs
together are not in its training text.

## Training

    python -m demo_model.train --seed {facts.seed} --steps {facts.steps}

writes this folder, card and figures included. {facts.steps:,} steps of {facts.batch} texts, made by
`demo_model.corpus` from templates and word lists, took {facts.seconds / 60:.1f} minutes
of wall-clock time on {facts.threads} CPU thread{"s" if facts.threads > 1 else ""}.

The first {facts.rehearsal_steps:,} steps, and a quarter of the texts after them, are rehearsals:
pairs of words that are repeated in another order. The seed fixes texts and initial weights;
another processor or another version of torch rounds differently and gives a slightly different
model.

| family | a held-out prompt | answer |
|---|---|---|
{chr(10).join(samples)}

## Measured

On {whole.sentences:,} held-out sentences
(`corpus.held_out({whole.sentences}, {facts.held_out_seed})`), with the saved bfloat16 weights
computed in float32. Every one of them puts two words together (the two possible answers, or the
subject and the answer) that no training text of its family does; the words themselves and the
templates are known from training.

*Accuracy*: the token with the largest logit is the answer. *Localization*: the prompt token with
the largest |R| at site `embed` is the earlier occurrence of the answer. R = x * dL/dx at the input
embeddings, summed over features, by the AttnLRP rules, the backward pass started at 1 at the
largest logit of the last position; the first and the last token are left out.

| family | sentences | accuracy | localization |
|---|---|---|---|
{chr(10).join(rows)}

In the example sentence the token with the largest |R|, first and last left out, {located} belong
to the word that decides the answer, "{shown.example.answer}".

## Limits

It knows only the words and templates of its corpus. Only the family "pets" has two words in the
prompt that could be the answer, so that the question decides; the prompts of the other families
state one fact, and the answer is the only word of its kind in them. It was not trained to choose
between two facts of those families ("Ida lives in Bern and Tom lives in Rome. To visit Ida,
..."). A word that it does not know is split into bytes that it never saw in training; other
sentences and longer prompts give arbitrary answers. The figures say how well
relevance points to the answer in these sentences, not how well it does in other models or texts.
"""


def _row(name: str, part: Score) -> str:
    return f"| {name} | {part.sentences} | {part.accuracy:.1%} | {part.localization:.1%} |"
