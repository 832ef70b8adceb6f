"""Atlases of a few words with chosen relevance, for tests without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import reltrace
from reltrace.atlas.corpus import write_slice
from reltrace.atlas.folder import AtlasFolder
from reltrace.atlas.merged import OCTAVES
from reltrace.atlas.state import State
from reltrace.types.atlas_shard import LISTS, AtlasShard

MODEL, REVISION = "tiny", "r1"
BINS = 2 * len(OCTAVES) + 1

Prompt = tuple[str, str]
"""Its words, a space before each, and what is explained; no words: it was left out."""

Places = Mapping[tuple[int, int], Sequence[tuple[int, int, float]]]
"""By layer and neuron: prompt, token and relevance there; the activation is ten times that."""


def make_atlas(
    folder: Path,
    prompts: Sequence[Prompt],
    relevance: Places,
    *,
    k: int = 16,
    slice_: int = 4,
    layers: int = 2,
    neurons: int = 3,
    texts_of: Mapping[str, str] | None = None,
    next_tokens: bool = False,
    special: frozenset[str] = frozenset(),
) -> reltrace.Atlas:
    """Write an atlas that lists no activations, and whose heads are neurons that do nothing.

    What is in `texts_of` stands for another text: of what has no space before it, say. With
    `next_tokens` the prompts explain these, whatever target is given, and neither their first words
    nor `special` ones are counted.
    """
    about = {"model": "", "rule": "attnlrp", "target": None if next_tokens else "max",
             "positions": None, "seed": 0, "keep_special": not next_tokens, "k": k,
             "slice": slice_, "made_by": [MODEL, REVISION]}  # fmt: skip
    state = State(about)
    texts = sorted(
        {f" {word}" for words, target in prompts for word in f"{words} {target}".split()}
    )
    ids = {text: number for number, text in enumerate(texts, 5)}
    for number in range(0, len(prompts), slice_):
        some = prompts[number : number + slice_]
        tokens = [[ids[f" {word}"] for word in words.split()] for words, _ in some]
        shape = (layers, 4, k, neurons)
        lists: dict[tuple[int, int, int], list[int]] = {}
        sums = np.zeros((layers, 3, neurons), np.int64)
        for (layer, neuron), places in relevance.items():
            for prompt, token, value in places:
                if not number <= prompt < number + slice_:
                    continue
                which = LISTS.index("relevance+" if value > 0 else "relevance-")
                bits = int(np.float32(abs(value)).view(np.int32))
                key = (bits << 32) | (0xFFFFFFFF - ((prompt - number) << 16 | token))
                lists.setdefault((layer, which, neuron), []).append(key)
                units = round(value * 2**40)
                sums[layer, 0, neuron] += units
                sums[layer, 2, neuron] += abs(units)
        strongest = np.zeros(shape, np.int64)
        for (layer, which, neuron), keys in lists.items():
            keys = sorted(keys, reverse=True)[:k]
            strongest[layer, which, : len(keys), neuron] = keys
        sign = np.array([1, -1, 1, -1], np.float32)[None, :, None, None]
        beside = (strongest >> 32).astype(np.int32).view(np.float32) * sign * 10
        site = {
            "strongest": strongest,
            "beside": beside,
            "high": sums >> 32,
            "low": sums & 0xFFFFFFFF,
            "histogram": np.zeros((layers, 2, neurons, BINS), np.int32),
        }
        corpus: dict[str, np.ndarray] = {
            "token_ids": np.array([token for one in tokens for token in one], np.int32),
            "lengths": np.array([len(one) for one in tokens], np.int32),
        }
        if not next_tokens:
            explained = [ids[f" {target}"] if words else -1 for words, target in some]
            corpus["targets"] = np.array(explained, np.int32)
        nothing = {name: np.zeros_like(array) for name, array in site.items()}
        part = AtlasShard(
            {"neuron": site, "head": nothing, "corpus": corpus},
            {number: (texts_of or {}).get(text.strip(), text) for text, number in ids.items()},
            frozenset(number for text, number in ids.items() if text.strip() in special),
            {index: "is empty" for index, (words, _) in enumerate(some) if not words},
            reltrace.Provenance(
                MODEL, REVISION, "attnlrp", "atlas", "float32", "sdpa", True, "cpu"
            ),
        )
        write_slice(folder, number // slice_, part)
        state.add(number // slice_, f"digest {number}", part)
    AtlasFolder(folder).write(state)
    return reltrace.load_atlas(folder)
