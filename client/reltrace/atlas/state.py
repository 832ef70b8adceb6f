"""The merged state of an atlas: everything but the corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reltrace.atlas.merged import MergedSite
from reltrace.atlas.slices import first_prompts
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import SITES, AtlasShard


@dataclass(eq=False)
class TokenCounts:
    """Counts of tokens, by their ids; int64 [V] each."""

    # Counted positions of the token.
    positions: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    # Prompts that have it.
    prompts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    # Prompts whose explained token it is; where prompts explain their own next tokens, counted
    # positions that it follows.
    targets: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, token_ids: Array, lengths: Array, counted: Array, targets: Array) -> None:
        """Add a slice: arrays of `AtlasShard`, which positions are counted (bool [T]), and the
        tokens that are explained (int [N]).
        """
        size = 1 + max((int(a.max()) for a in (token_ids, targets) if a.size), default=-1)
        prompt = np.repeat(np.arange(len(lengths)), lengths)
        pairs = np.unique(prompt * size + token_ids)
        self.positions = _sum(self.positions, np.bincount(token_ids[counted], minlength=size))
        self.prompts = _sum(self.prompts, np.bincount(pairs % max(size, 1), minlength=size))
        self.targets = _sum(self.targets, np.bincount(targets, minlength=size))


def _sum(one: Array, other: Array) -> Array:
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


@dataclass(eq=False)
class State:
    """Everything of an atlas but the corpus."""

    about: dict[str, Any]  # settings, and "made_by": name and revision of the model
    sites: dict[str, MergedSite] = field(default_factory=dict)  # empty before the first slice
    digests: dict[int, str] = field(default_factory=dict)  # of the slices that are merged
    vocabulary: dict[int, str] = field(default_factory=dict)  # texts of the tokens
    special: set[int] = field(default_factory=set)  # special tokens among them
    skipped: dict[int, str] = field(default_factory=dict)  # prompts that were left out, and why
    prompts: int = 0  # that were read
    tokens: int = 0
    counts: TokenCounts = field(default_factory=TokenCounts)

    @property
    def counted(self) -> int:
        """Number of counted positions: by default without first and special tokens."""
        return int(self.counts.positions.sum())

    @property
    def next_tokens(self) -> bool:
        """Whether prompts explain their own next tokens."""
        return self.about["target"] is None

    def first_prompts(self) -> Array:
        """Return the number of the first prompt of each slice, and of the next."""
        return first_prompts(1 + max(self.digests, default=-1), self.about["slice"])

    def known_tokens(self) -> Array:
        """Return which tokens have a text and counts: bool [V]."""
        known = np.zeros(len(self.counts.positions), bool)
        ids = np.fromiter(self.vocabulary, np.int64, len(self.vocabulary))
        known[ids[(ids >= 0) & (ids < len(known))]] = True
        return known

    def check(self) -> None:
        """Raise ValueError if the arrays contradict each other: the file is damaged."""
        if len({len(array) for array in vars(self.counts).values()}) > 1:
            raise ValueError("the counts of tokens differ in length")
        slice_starts = self.first_prompts()
        known = np.zeros(len(slice_starts), bool)
        known[list(self.digests)] = True
        for site, merged in self.sites.items():
            lists = merged.values, merged.beside, merged.prompts, merged.tokens
            if len({array.shape for array in lists}) > 1:
                raise ValueError(f"the lists of site {site!r} differ in shape")
            # A layer at a time: of a large model all of them are gigabytes.
            for prompts, tokens in zip(merged.prompts, merged.tokens, strict=True):
                exists = prompts >= 0
                if min(prompts.min(initial=-1), tokens.min(initial=-1)) < -1:
                    raise ValueError(f"site {site!r} has numbers below -1")
                if not np.array_equal(exists, tokens >= 0):
                    raise ValueError(f"site {site!r} has tokens without a prompt, or the reverse")
                # The last start is of a slice that does not exist.
                numbers = np.searchsorted(slice_starts, prompts[exists], "right") - 1
                if not known[numbers].all():
                    raise ValueError(f"site {site!r} names prompts that the corpus does not have")

    def add(self, number: int, digest: str, shard: AtlasShard) -> None:
        first = int(first_prompts(number, self.about["slice"])[-1])
        for site in SITES:
            arrays = shard.arrays[site]
            shape, bins = arrays["strongest"].shape, arrays["histogram"].shape[-1]
            self.sites.setdefault(site, MergedSite.empty(shape, bins)).add(arrays, first)
        corpus = shard.arrays["corpus"]
        ids, lengths = corpus["token_ids"], corpus["lengths"]
        self.prompts += int(np.count_nonzero(lengths))
        self.tokens += len(ids)
        begins, ends = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        last = np.cumsum(lengths[lengths > 0], dtype=np.int64) - 1
        ends[last] = True
        begins[last - lengths[lengths > 0] + 1] = True
        counted = np.ones(len(ids), bool)
        if not self.about["keep_special"]:
            counted = ~(begins | np.isin(ids, list(shard.special)))
        if self.next_tokens:
            targets = np.roll(ids, -1)[counted & ~ends]
        else:
            targets = corpus["targets"][corpus["targets"] >= 0]
        self.counts.add(ids, lengths, counted, targets)
        self.vocabulary |= shard.vocabulary
        self.special |= shard.special
        self.skipped |= {first + index: why for index, why in shard.skipped.items()}
        self.digests[number] = digest
