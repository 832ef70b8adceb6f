"""The size of a result, known before any pass."""

from __future__ import annotations

import math

import torch

from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.engine.reductions import REDUCTIONS, Sizes
from reltrace_worker.engine.sites import SITES
from reltrace_worker.models.loading import ModelShape
from reltrace_worker.types.jobs import AtlasJob, Job, TraceJob


def result_bytes(job: Job, shape: ModelShape, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of the tensors of a job's result, relevance in the format `dtype`."""
    if isinstance(job, AtlasJob):
        return Atlas.result_bytes(job, shape)
    if not isinstance(job, TraceJob):
        return 0
    reduction = REDUCTIONS[job.reduction]
    value = sum((dtype if part.is_floating_point else part).itemsize for _, part in reduction.parts)
    total = 0
    for site in map(SITES.__getitem__, job.sites):
        features, tokens = site.features(shape), len(job.token_ids)
        k = min(job.k, tokens * features)
        layers = (len(job.layers) or shape.layers) if site.per_layer else 1
        total += math.prod(reduction.shape(Sizes(tokens, 1, features, k))) * layers * value
    return total * len(job.targets)
