"""Reading an atlas: the contexts of a neuron or a head, what it is called, who has which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.atlas.examples import Context, ContextLists, Feature, StandsOut
from reltrace.atlas.folder import Folder
from reltrace.atlas.imported_labels import GivenLabels, Key, described
from reltrace.atlas.labels import Standouts, label_of
from reltrace.atlas.merged import Merged
from reltrace.atlas.reader import Reader
from reltrace.atlas.search import FeatureMatch, Search, ranked
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import LISTS, MEASURES, SITES, SUMS
from reltrace.types.checks import whole_number
from reltrace.types.errors import invalid

_LABELS_KEPT = 1 << 16


class Atlas:
    """An atlas that `reltrace atlas build` or `Client.build_atlas` made.

    Parameters
    ----------
    path : path
        Its folder.

    Raises
    ------
    InvalidArgument
        There is none, or it is damaged.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        folder = Folder(Path(path))
        self._state = folder.read()
        self._reader = Reader(folder, self._state)
        self._standouts = Standouts(self._reader, self._state)
        self._given = GivenLabels(folder.path, self._check, self.about.get("made_by", ()))
        self._built_in = lru_cache(_LABELS_KEPT)(self._stands_out)
        self._sums = {site: merged.sums() for site, merged in self._state.sites.items()}

    def __repr__(self) -> str:
        model, _ = self.about["made_by"]
        return (
            f"Atlas({model}, {self.prompts} prompts, {self.tokens} tokens, {self.layers} layers of "
            f"{self.features()} neurons and {self.features('head')} heads)"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from reltrace.viz.atlas_fragment import atlas_fragment

        return atlas_fragment(self)

    @property
    def about(self) -> dict[str, Any]:
        """Model, revision, rule; target (None: each prompt's own next tokens; a token's id is an
        int), at how many positions, drawn by which seed; places of each list, most prompts of a
        slice.
        """
        return dict(self._state.about)

    @property
    def tokens(self) -> int:
        """How many were read; `Feature.count` says how many of them are counted."""
        return self._state.tokens

    @property
    def prompts(self) -> int:
        """How many were read."""
        return self._state.prompts

    @property
    def skipped(self) -> dict[int, str]:
        """Prompts that were left out, by their number, and why."""
        return dict(self._state.skipped)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return int(self._of("neuron").values.shape[0])

    def features(self, site: str = "neuron") -> int:
        """Return how many neurons, or heads, a layer has."""
        return int(self._of(site).values.shape[3])

    def neuron(self, layer: int, index: int) -> Feature:
        """Return a neuron of the MLP of a decoder layer."""
        return self.feature("neuron", layer, index)

    def head(self, layer: int, index: int) -> Feature:
        """Return an attention head of a decoder layer."""
        return self.feature("head", layer, index)

    def feature(self, site: str, layer: int, index: int) -> Feature:
        """Return a neuron or head.

        Raises
        ------
        InvalidArgument
            There is none such.
        """
        self._check(site, layer, index)
        layer, index = int(layer), int(index)
        merged = self._of(site)
        sums = dict(zip(SUMS, self._sums[site][layer, :, index].tolist(), strict=True))
        count = self._state.places
        return Feature(
            site=site,
            layer=layer,
            index=index,
            label=self.label(layer, index, site),
            labelled_by=self._given.by((site, layer, index)),
            stands_out=self._built_in((site, layer, index)),
            contexts=ContextLists(
                partial(self._contexts, merged, layer, index),
                {
                    name: int((merged.prompts[layer, place, :, index] >= 0).sum())
                    for place, name in enumerate(LISTS)
                },
            ),
            count=count,
            mean={name: sums[name] / count if count else float("nan") for name in MEASURES},
            mass=sums["relevance mass"],
            _histograms={
                measure: merged.histogram[layer, place, index]
                for place, measure in enumerate(MEASURES)
            },
        )

    def label(self, layer: int, index: int, site: str = "neuron") -> str:
        """Return what a neuron or head is called: as it was imported, else what stands out.

        Built in are up to three tokens that stand out, by their log-odds against the corpus,
        in the contexts where it speaks for the prediction: ``dogs`` at the place itself,
        ``… dogs`` before it, ``→ dogs`` as what follows or is explained. "" where none does. Words
        go before punctuation and white space, unless these stand out more than twice as clearly.

        Raises
        ------
        InvalidArgument
            There is none such.
        """
        self._check(site, layer, index)
        given = self._given.get((site, layer, index))
        return label_of(self._built_in((site, layer, index))) if given is None else given.text

    def mass(self, site: str = "neuron") -> Array:
        """Return the size of the relevance, |R|, of all counted tokens: float64 [L, F]."""
        self._of(site)
        result: Array = self._sums[site][:, SUMS.index("relevance mass")]
        return result

    def by_mass(self, site: str = "neuron", most: int | None = None) -> Iterator[Feature]:
        """Return neurons or heads, those with most relevance first.

        Parameters
        ----------
        site : {"neuron", "head"}
            Of which.
        most : int, optional
            At most so many, 1 or more; default: all.

        Raises
        ------
        InvalidArgument
            An argument is wrong.
        """
        mass = self.mass(site)
        if most is not None:
            whole_number(most, "most", 1)
        order = np.argsort(-mass, axis=None, kind="stable")[:most].tolist()
        return (self.feature(site, *divmod(flat, mass.shape[1])) for flat in order)

    def find(
        self,
        text: str,
        *,
        site: str = "neuron",
        measure: str = "relevance",
        k: int = 20,
    ) -> list[FeatureMatch]:
        """Return the neurons or heads whose contexts, or given label, have a text.

        A context has it where it begins at the token where the feature is strong, or at one of the
        24 before; or in its target.

        Parameters
        ----------
        text : str
            However it is capitalised; it may run over several tokens, and over the end of a line. A
            space finds white space of any kind that is shown as one.
        site : {"neuron", "head"}
            Of which.
        measure : {"relevance", "activation"}
            By which the contexts are strong.
        k : int, default 20
            At most so many.

        Returns
        -------
        list of FeatureMatch
            First those whose given label has it; then by how many contexts of a list have it, and
            how strong these are.

        Raises
        ------
        InvalidArgument
            An argument is wrong.
        """
        if not isinstance(text, str) or not text.strip():
            raise invalid("text", "must not be empty")
        if measure not in MEASURES:
            raise invalid("measure", f"must be one of {', '.join(MEASURES)}, not {measure!r}")
        whole_number(k, "k", 1)
        merged = self._of(site)
        search = Search(self._reader, self._state, text)
        lists = [search.hits(site, name) for name in LISTS if name.startswith(measure)]
        labelled = [key[1:] for key in self._given.matching(text) if key[0] == site]
        found = []
        for layer, index, hits in ranked(lists, labelled, k):
            at = layer, index
            there = hits.counts[at] > 0
            first = int(hits.first[at])
            contexts = self._contexts(merged, layer, index, hits.name, first + 1) if there else []
            found.append(
                FeatureMatch(
                    site,
                    layer,
                    index,
                    self.label(layer, index, site),
                    hits.name,
                    int(hits.counts[at]),
                    int(hits.of[at]),
                    float(hits.strength[at]),
                    contexts[first] if contexts else None,
                )
            )
        return found

    def prompt(self, number: int) -> tuple[str, ...]:
        """Return the tokens of a prompt of the corpus; none where it was left out.

        Raises
        ------
        InvalidArgument
            There is none such.
        """
        return self._reader.tokens(whole_number(number, "number"))

    def save_page(self, path: str | PathLike[str], *, most: int = 2000, contexts: int = 8) -> Path:
        """Write a page to browse: one file, which loads nothing.

        Parameters
        ----------
        path : path
            Ends in .html.
        most : int, default 2000
            Neurons, and heads, that the page has: those with most relevance.
        contexts : int, default 8
            Shown of each list. All are searched.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        InvalidArgument
            An argument is wrong.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise invalid("path", f"must end in .html, not {path.name!r}")
        whole_number(most, "most", 1)
        whole_number(contexts, "contexts", 1)
        from reltrace.viz import atlas_page

        atlas_page.write(self, path, most=most, contexts=contexts)
        return path

    def export_labels(
        self, path: str | PathLike[str], *, site: str = "neuron", most: int | None = None
    ) -> int:
        """Write labels with their contexts, for a person or a language model to better them.

        A line of JSON each: "site", "layer", "index", "label", "by" (who gave it; "log-odds": it is
        built in), "mass", "made_by" (name and revision of the model), and "contexts", the strongest
        of positive relevance, each with "relevance", "activation", "text" (the token where it is
        strong between ⟦ and ⟧), "token" and "target".

        Parameters
        ----------
        path : path
            The file; one that is there is replaced. Not the atlas' own, of the labels given to it.
        site : {"neuron", "head"}
            Of which.
        most : int, optional
            Those with most relevance, 1 or more; default: all.

        Returns
        -------
        int
            How many labels.

        Raises
        ------
        InvalidArgument
            An argument is wrong; the file is as it was.
        OSError
            The file can not be written.
        """
        count, features = 0, self.by_mass(site, most)
        self._given.check_other(Path(path))
        with Path(path).open("w", encoding="utf-8") as file:
            for feature in features:
                record = described(feature) | {"made_by": self._given.made_by}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        return count

    def import_labels(self, path: str | PathLike[str]) -> int:
        """Take labels of a file: all of them, or, where a line is wrong, none.

        Parameters
        ----------
        path : path
            Lines of JSON with "layer", "index" and "label", and, if need be, "site" (default
            "neuron"), "by", and "made_by", which must be the atlas' own; anything else in them is
            passed over. An empty label takes one away. What `export_labels` wrote and nobody
            changed is passed over as well.

        Returns
        -------
        int
            How many labels were given, changed or taken away.

        Raises
        ------
        InvalidArgument
            A line is wrong; the message names it and what is allowed.
        OSError
            The file can not be read.
        """
        return self._given.take(Path(path), lambda key: label_of(self._built_in(key)))

    def _of(self, site: str) -> Merged:
        if site not in SITES:
            raise invalid("site", f"must be one of {', '.join(SITES)}, not {site!r}")
        return self._state.sites[site]

    def _check(self, site: str, layer: int, index: int) -> None:
        layers, _, _, features = self._of(site).values.shape
        whole_number(layer, "layer", most=layers - 1)
        whole_number(index, site, most=features - 1)

    def _stands_out(self, key: Key) -> list[StandsOut]:
        site, layer, index = key
        merged, which = self._of(site), LISTS.index("relevance+")
        prompts = merged.prompts[layer, which, :, index]
        positions = merged.tokens[layer, which, :, index]
        there = prompts >= 0
        return self._standouts.of(prompts[there].tolist(), positions[there].tolist())

    def _contexts(
        self, merged: Merged, layer: int, index: int, name: str, most: int
    ) -> list[Context]:
        """Return the strongest contexts of a list, `most` or as many as there are."""
        which, sign = LISTS.index(name), -1.0 if name.endswith("-") else 1.0
        own, prompts, positions, beside = (
            array[layer, which, :most, index].tolist()
            for array in (merged.values, merged.prompts, merged.tokens, merged.beside)
        )
        read, contexts = self._reader, []
        for value, prompt, position, other in zip(own, prompts, positions, beside, strict=True):
            if prompt < 0:
                break
            pair = (sign * value, other)
            relevance, activation = pair if name.startswith("relevance") else pair[::-1]
            tokens, target = read.tokens_around(prompt, position), read.target(prompt, position)
            contexts.append(Context(relevance, activation, prompt, position, tokens, target))
        return contexts
