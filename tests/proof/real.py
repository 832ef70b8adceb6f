"""The proofs on real models: what rules say of plain English, and how exact the numbers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reltrace
from bench.service import serving
from proof import capitals, names, one_neuron
from proof.noise import Noise, measure_noise
from proof.sentences import SENTENCES
from reference.real_models import PACKAGES, gguf_file
from reltrace.evaluation.scores import Mean
from reltrace_worker.models import load_model

_NOISY = 16
"""Sentences by which formats are compared."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What one evaluation says of one rule.

    Attributes
    ----------
    rule : str
        Which; "random" is an order of chance.
    area : Mean
        Area between the curves, in units of log-probability.
    hit, mass : Mean or None
        Share of prompts whose most relevant token is what the prediction is known to rest on, and
        the share of positive relevance on it; None where that is not known.
    """

    rule: str
    area: Mean
    hit: Mean | None
    mass: Mean | None


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation.

    Attributes
    ----------
    prompts : str
        Which.
    count : int
        How many were evaluated.
    off : str
        What was taken out: "embed" (tokens) or "neuron".
    rules : list of Judged
        How they did.
    best : list of str
        The rule with the largest area, and those that can not be told from it.
    warnings : list of str
        Why the areas can not be trusted, where they can not.
    """

    prompts: str
    count: int
    off: str
    rules: list[Judged]
    best: list[str]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class RealReport:
    """What was found on SmolLM2, and on Gemma 3 where `noise` says so."""

    trials: list[Trial]
    shares: list[names.Shares]
    neurons: list[one_neuron.OneNeuron]
    noise: list[Noise]


def trials(
    client: reltrace.Client, count: int, pairs: Sequence[names.Sentence], seed: int, progress: bool
) -> Iterator[Trial]:
    """Evaluate all rules on the first so many of each kind of prompts."""
    named = [
        {"prompt": one.prompt, "target": one.target, "answer": one.indirect_object} for one in pairs
    ]
    kinds: tuple[tuple[str, Sequence[Any], tuple[str, ...]], ...] = (
        ("capitals", capitals.predicted()[:count], ("embed",)),
        ("names", named, ("embed",)),
        ("sentences", SENTENCES[:count], ("embed", "neuron")),
    )
    for kind, prompts, sites in kinds:
        for site in sites:
            found = client.evaluate(prompts, site=site, seed=seed, progress=progress)
            assert not found.failures, found.failures
            yield Trial(
                kind,
                found.prompts,
                site,
                [Judged(r, s.area, s.hit, s.mass) for r, s in found.rules.items()],
                list(found.best()),
                list(found.warnings),
            )


def prove(scratch: Path, seed: int, progress: bool) -> RealReport:
    """Prove everything at full size."""
    noise = [
        measure_noise(load_model(str(gguf_file(name, scratch)), dtype="float32"), some)
        for name in PACKAGES
        for some in (SENTENCES[:_NOISY],)
    ]
    pairs = names.sentences(40, seed)
    with serving("smollm2", RELTRACE_THREADS="2") as address, reltrace.Client(address) as client:
        return RealReport(
            list(trials(client, len(SENTENCES), pairs, seed, progress)),
            names.shares(client, pairs),
            [one_neuron.scale_one(client, SENTENCES, scale, 8, seed) for scale in (0.0, -1.0)],
            noise,
        )


def rows(report: RealReport) -> Iterator[tuple[str, str, str] | None]:
    """Yield the rows of a table; None ends a section."""
    for trial in report.trials:
        first = f"{trial.count} {trial.prompts}"
        off = "tokens" if trial.off == "embed" else "neurons"
        for judged in trial.rules:
            yield first, f"{judged.rule}: area, {off} off", str(judged.area)
            first = ""
            if judged.hit is not None and judged.mass is not None:
                located = f"{_percent(judged.hit)}, {_percent(judged.mass)}"
                yield "", "most relevant, positive relevance on it", located
        yield "", "best", " or ".join(trial.best)
        for warning in trial.warnings:
            yield "", "warning", warning
        yield None
    for shares in report.shares:
        first = f"names, {shares.rule}"
        solved = f"{shares.order}: right in"
        yield first, solved, _percent(shares.solved)
        for part, mean in shares.parts.items():
            yield "", f"share of |R|, {part}", str(mean)
        yield None
    for one in report.neurons:
        first = f"one neuron x {one.scale:g}"
        for way, share in one.changed.items():
            yield first, f"another word, most relevant {way}", _percent(share)
            first = ""
        for text in one.texts:
            yield "", f"... {text.prompt[-30:]}", f"{text.before!r} > {text.after!r}"
        yield None
    for noise in report.noise:
        yield (
            noise.model,
            "bfloat16: another token, logit off by at most",
            f"{noise.other_token} of {noise.prompts}, {noise.logit:.2f}",
        )
        for error in noise.errors:
            figures = f"{error.median:.1e}, {error.p95:.1e}, {error.largest:.1e}"
            yield "", f"{error.compared}: {error.site}, {error.reduction}", figures
        yield None


def _percent(mean: Mean) -> str:
    return f"{mean.mean:.0%} ± {mean.margin:.0%}"
