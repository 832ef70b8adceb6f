"""The atlas of a slice of a corpus, as a worker returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reltrace.types.arrays import Array
from reltrace.types.provenance import Provenance

SITES = ("neuron", "head")
LISTS = ("relevance+", "relevance-", "activation+", "activation-")
MEASURES = ("relevance", "activation")
SUMS = (*MEASURES, "relevance mass")


@dataclass(frozen=True, eq=False)
class AtlasShard:
    """The atlas of one slice.

    Attributes
    ----------
    arrays : mapping of str to mapping of str to ndarray
        Of the sites "neuron" and "head": "strongest", int64 [L, 4, k, F], keys in the order of
        `LISTS`: bits of a positive float32 above, below them the complement of
        ``prompt << 16 | token``, 0 where there is none; "beside", float32 of the same shape, the
        activation in lists of relevance and the reverse; "high" and
        "low", int64 [L, 3, F], sums in the order of `SUMS`: ``high * 2**32 + low`` units of 2**-40;
        "histogram", int32 [L, 2, F, bins], in the order of `MEASURES`. Of the site "corpus":
        "token_ids", int32 [T], "lengths", int32 [P], 0 where a prompt was left out, and, where
        prompts do not explain their own next tokens, "targets", int32 [P], the token that is
        explained; -1: left out.
    vocabulary : dict of int to str
        Texts of the prompts' tokens and of the explained tokens, by id.
    special : frozenset of int
        Ids among these that are special tokens of the tokenizer.
    skipped : dict of int to str
        Why prompts were left out, by their number in the slice.
    provenance : Provenance
        Model, rule and versions.
    """

    arrays: Mapping[str, Mapping[str, Array]]
    vocabulary: dict[int, str]
    special: frozenset[int]
    skipped: dict[int, str]
    provenance: Provenance
