"""Random atlas shards in the form that workers return, for tests without a model."""

from __future__ import annotations

import numpy as np
import reltrace
from reltrace.atlas.merged import OCTAVES
from reltrace.types.atlas_shard import AtlasShard

BINS = 2 * len(OCTAVES) + 1
PROVENANCE = reltrace.Provenance("tiny", "r1", "attnlrp", "atlas", "float32", "sdpa", True, "cpu")


def make_shard(
    number: int,
    *,
    prompts: int = 2,
    tokens: int = 4,
    k: int = 2,
    layers: int = 3,
    neurons: int = 5,
) -> AtlasShard:
    """Return the part of a slice, always the same of one number.

    Each prompt has `tokens` tokens; of the neurons all places of all lists are taken.
    """
    random = np.random.default_rng(number)

    def site(features: int) -> dict[str, np.ndarray]:
        shape = layers, 4, k, features
        values = -np.sort(-random.random(shape, np.float32), axis=2)
        place = random.integers(0, prompts, shape) << 16 | random.integers(0, tokens, shape)
        return {
            "strongest": values.view(np.int32).astype(np.int64) << 32 | (0xFFFFFFFF - place),
            "beside": random.random(shape, np.float32),
            "high": random.integers(0, 9, (layers, 3, features)),
            "low": random.integers(0, 2**32, (layers, 3, features)),
            "histogram": random.integers(0, 9, (layers, 2, features, BINS), np.int32),
        }

    corpus = {
        "token_ids": random.integers(0, 7, prompts * tokens).astype(np.int32),
        "lengths": np.full(prompts, tokens, np.int32),
        "targets": random.integers(0, 7, prompts).astype(np.int32),
    }
    return AtlasShard(
        {"neuron": site(neurons), "head": site(2), "corpus": corpus},
        {token: f" word{token}" for token in range(7)},
        frozenset(),
        {},
        PROVENANCE,
    )
