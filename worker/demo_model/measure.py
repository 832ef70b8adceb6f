"""How well a model answers, and whether its relevance points to where the answer stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reltrace_worker.engine import Engine, JobPreparer
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.jobs import TraceRequest
from reltrace_worker.types.results import JobResult

from demo_model.corpus import Example

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one sentence gave.

    Parameters
    ----------
    example
        The sentence.
    predicted
        Readable text of the token with the largest logit after the prompt.
    answered
        That token is the answer.
    located
        Of all prompt tokens but the first and the last, the one whose relevance at site
        ``embed`` is largest in size is the deciding one.
    """

    example: Example
    predicted: str
    answered: bool
    located: bool


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of a set of sentences, each between 0 and 1.

    Parameters
    ----------
    sentences
        How many sentences were measured, at least 1.
    accuracy
        Share that was answered right.
    localization
        Share whose deciding token has the largest relevance, whatever the answer was.
    """

    sentences: int
    accuracy: float
    localization: float


def measure(
    loaded: LoadedModel, examples: Sequence[Example], *, rule: str = "attnlrp"
) -> list[Outcome]:
    """Trace every example as the service does and compare with what the corpus knows.

    R = x * dL/dx at the input embeddings x [T, hidden], summed over features; the backward pass
    follows `rule` and starts with 1 at the largest logit L of the last position.

    Parameters
    ----------
    loaded
        A model whose tokenizer gives character offsets.
    examples
        The sentences.
    rule
        Name of the rule.

    Raises
    ------
    EngineError
        A pass failed, or its numbers are not finite.
    """
    engine = Engine(loaded, checkpointing="off")
    preparer = JobPreparer(loaded)
    outcomes: list[Outcome] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        jobs = [
            preparer.prepare(TraceRequest(e.prompt, sites=("embed",), rule=rule)) for e in batch
        ]
        for example, result in zip(batch, engine.run(jobs), strict=True):
            if not isinstance(result, JobResult):
                raise result
            relevance = result.tensors[0].values.abs()
            strongest = 1 + int(relevance[1:-1].argmax())
            encoded = loaded.tokenizer(example.prompt)
            answer = loaded.tokenizer(f" {example.answer}", add_special_tokens=False).input_ids
            target = result.targets[0]
            outcomes.append(
                Outcome(
                    example=example,
                    predicted=target.token.strip(),
                    answered=[target.token_id] == answer,
                    located=strongest == encoded.char_to_token(example.deciding[0]),
                )
            )
    return outcomes


def score(outcomes: Sequence[Outcome]) -> Score:
    """Sum up outcomes, at least one."""
    if not outcomes:
        raise ValueError("outcomes is empty; a share needs at least one sentence")
    return Score(
        sentences=len(outcomes),
        accuracy=sum(outcome.answered for outcome in outcomes) / len(outcomes),
        localization=sum(outcome.located for outcome in outcomes) / len(outcomes),
    )


def by_family(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Score every family on its own, in the order in which they first appear."""
    names = dict.fromkeys(outcome.example.family for outcome in outcomes)
    return {name: score([o for o in outcomes if o.example.family == name]) for name in names}
