"""How much of a relevance is rounding? Number formats, and neighbours in a pack, on real weights.

An error is that of one layer of one trace: its largest difference over its largest |R|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from reference.loaded import prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.models import LoadedModel
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one site, over prompts and layers.

    Attributes
    ----------
    compared : str
        What with what.
    site, reduction : str
        Of the traces.
    median, p95, largest : float
        Of the errors.
    """

    compared: str
    site: str
    reduction: str
    median: float
    p95: float
    largest: float


@dataclass(frozen=True, slots=True)
class Noise:
    """What formats and packs change.

    Attributes
    ----------
    model : str
        Its name.
    prompts : int
        How many were traced, by AttnLRP.
    other_token : int
        For how many of them bfloat16 predicts another token than float32.
    logit : float
        The largest difference of the predicted token's logit between the formats.
    errors : list of Errors
        Of the traces of the token that float32 predicts.
    """

    model: str
    prompts: int
    other_token: int
    logit: float
    errors: list[Errors]


def measure_noise(
    exact: LoadedModel, prompts: Sequence[str], reductions: Sequence[str] = ("token", "full")
) -> Noise:
    """Compare bfloat16 with `exact`, and in each format prompts in one pack with prompts alone."""
    assert exact.dtype == torch.float32
    plain = [TraceRequest(prompt, ()) for prompt in prompts]
    before = [result.targets[0] for result in _run(exact, plain)]
    specs = [
        TraceRequest(prompt, tuple(SITES), reduction, (TargetRequest(target.token_id),))
        for reduction in reductions
        for prompt, target in zip(prompts, before, strict=True)
    ]
    packed, alone = _run(exact, specs), _run_alone(exact, specs)
    rough = replace(exact, model=deepcopy(exact.model).bfloat16(), dtype=torch.bfloat16)
    after = [result.targets[0] for result in _run(rough, plain)]
    rough_packed, rough_alone = _run(rough, specs), _run_alone(rough, specs)
    errors = [
        *_errors("bfloat16 and float32", specs, rough_alone, alone),
        *_errors("packed and alone, float32", specs, packed, alone),
        *_errors("packed and alone, bfloat16", specs, rough_packed, rough_alone),
    ]
    pairs = list(zip(rough_alone, alone, strict=True))
    return Noise(
        exact.name,
        len(prompts),
        sum(new.token_id != old.token_id for new, old in zip(after, before, strict=True)),
        max(abs(new.targets[0].logit - old.targets[0].logit) for new, old in pairs),
        errors,
    )


def _run(loaded: LoadedModel, specs: Sequence[TraceRequest]) -> list[JobResult]:
    return run(Engine(loaded, "off"), prepare(loaded, *specs))


def _run_alone(loaded: LoadedModel, specs: Sequence[TraceRequest]) -> list[JobResult]:
    engine = Engine(loaded, "off")
    return [result for job in prepare(loaded, *specs) for result in run(engine, [job])]


def _errors(
    compared: str, specs: Sequence[TraceRequest], ours: list[JobResult], theirs: list[JobResult]
) -> Iterator[Errors]:
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for spec, result, reference in zip(specs, ours, theirs, strict=True):
        for tensor, wanted in zip(result.tensors, reference.tensors, strict=True):
            layers = 1 if tensor.site == "embed" else len(wanted.values)
            difference, size = (
                values.abs().reshape(layers, -1).amax(1)
                for values in (tensor.values - wanted.values, wanted.values)
            )
            assert size.min() > 0
            found.setdefault((tensor.site, spec.reduction), []).append(difference / size)
    for (site, reduction), parts in found.items():
        errors = torch.cat(parts).double()
        median, p95 = errors.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        yield Errors(compared, site, reduction, median, p95, float(errors.max()))
