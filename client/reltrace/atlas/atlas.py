"""An atlas as its users read it: the features of a model, their labels and contexts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.atlas.corpus import Corpus
from reltrace.atlas.examples import Context, ContextLists, Feature, SalientToken
from reltrace.atlas.folder import AtlasFolder
from reltrace.atlas.imported_labels import BUILT_IN, ImportedLabels, Key, described
from reltrace.atlas.labels import label_of, salient_tokens
from reltrace.atlas.merged import MergedSite
from reltrace.atlas.search import FeatureMatch, Search, ranked
from reltrace.storage.atomic_files import with_filename
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import LISTS, MEASURES, SITES, SUMS
from reltrace.types.checks import check_name, whole_number
from reltrace.types.errors import invalid

_CACHED_LABELS = 1 << 16


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
        folder = AtlasFolder(Path(path))
        self._state = folder.read()
        self._corpus = Corpus(folder.path, self._state)
        self._imported = ImportedLabels(folder.path, self._check, self.about.get("made_by", ()))
        self._salient = lru_cache(_CACHED_LABELS)(self._salient_tokens)
        self._sums = {site: merged.sums() for site, merged in self._state.sites.items()}

    def __repr__(self) -> str:
        model, _ = self.about["made_by"]
        return (
            f"Atlas({model}, {self.prompts} prompts, {self.tokens} tokens, {self.layers} layers of "
            f"{self.features()} neurons and {self.features('head')} heads)"
        )

    def _repr_html_(self) -> str:
        from reltrace.viz.notebook import atlas_html

        return atlas_html(self)

    @property
    def about(self) -> dict[str, Any]:
        """The arguments of `Client.build_atlas`, and "made_by": name and revision of the model."""
        return dict(self._state.about)

    @property
    def tokens(self) -> int:
        """Number of tokens that were read; `Feature.count` of them are counted."""
        return self._state.tokens

    @property
    def prompts(self) -> int:
        """Number of prompts that were read."""
        return self._state.prompts

    @property
    def skipped(self) -> dict[int, str]:
        """Prompts that were left out, by their number, with the reason."""
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
        key, merged = (site, layer, index), self._of(site)
        sums = dict(zip(SUMS, self._sums[site][layer, :, index].tolist(), strict=True))
        count, imported = self._state.counted, self._imported.get(key)
        sizes = (merged.prompts[layer, :, :, index] >= 0).sum(1).tolist()
        return Feature(
            site=site,
            layer=layer,
            index=index,
            label=self.label(layer, index, site),
            labelled_by=BUILT_IN if imported is None else imported.by,
            salient_tokens=self._salient(key),
            contexts=ContextLists(
                partial(self._contexts, key), dict(zip(LISTS, sizes, strict=True))
            ),
            count=count,
            mean={name: sums[name] / count if count else float("nan") for name in MEASURES},
            mass=sums["relevance mass"],
            _histograms=dict(zip(MEASURES, merged.histogram[layer, :, index], strict=True)),
        )

    def label(self, layer: int, index: int, site: str = "neuron") -> str:
        """Return the label of a neuron or head: the imported one, else the built-in one.

        A built-in label is made of up to three salient tokens, by their log-odds against the
        corpus, of the contexts of positive relevance: ``dogs`` at the context's position,
        ``… dogs`` before it, ``→ dogs`` as its target. "" if there are none. Words go before
        punctuation and white space, unless these are more than twice as clear.

        Raises
        ------
        InvalidArgument
            There is none such.
        """
        self._check(site, layer, index)
        key = (site, layer, index)
        imported = self._imported.get(key)
        return self._built_in(key) if imported is None else imported.text

    def mass(self, site: str = "neuron") -> Array:
        """Return the sum of |R| over all counted tokens: float64 [L, F]."""
        self._of(site)
        result: Array = self._sums[site][:, SUMS.index("relevance mass")]
        return result

    def by_mass(self, site: str = "neuron", most: int | None = None) -> Iterator[Feature]:
        """Yield neurons or heads, those with most relevance first.

        Parameters
        ----------
        site : {"neuron", "head"}
            Of neurons or of heads.
        most : int, optional
            Number of them at most, from 1 on; default: all.

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
        """Return the neurons or heads whose contexts, or imported label, have a text.

        A context has it if it begins at the context's position or at one of the 24 tokens before,
        or is in its target.

        Parameters
        ----------
        text : str
            However it is capitalised; it may run over several tokens, and over the end of a line. A
            space finds white space of any kind that is shown as one.
        site : {"neuron", "head"}
            Of neurons or of heads.
        measure : {"relevance", "activation"}
            Measure by which the contexts are strong.
        k : int, default 20
            Number of results at most.

        Returns
        -------
        list of FeatureMatch
            First those whose imported label has it; then by how many contexts of a list have it,
            and how strong these are.

        Raises
        ------
        InvalidArgument
            An argument is wrong.
        """
        if not isinstance(text, str) or not text.strip():
            raise invalid("text", "must not be empty")
        check_name(measure, "measure", MEASURES)
        whole_number(k, "k", 1)
        self._of(site)
        search = Search(self._corpus, self._state, text)
        lists = [search.hits(site, name) for name in LISTS if name.startswith(measure)]
        labelled = [key[1:] for key in self._imported.matching(text) if key[0] == site]
        found = []
        for layer, index, hits in ranked(lists, labelled, k):
            at = layer, index
            strongest, first = None, int(hits.first[at])
            if hits.counts[at] > 0:
                strongest = self._contexts((site, *at), hits.name, first + 1)[first]
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
                    strongest,
                )
            )
        return found

    def prompt(self, number: int) -> tuple[str, ...]:
        """Return the tokens of a prompt of the corpus; none if it was left out.

        Raises
        ------
        InvalidArgument
            There is none such.
        """
        return self._corpus.tokens(whole_number(number, "number"))

    def save_page(self, path: str | PathLike[str], *, most: int = 2000, contexts: int = 8) -> Path:
        """Write a page to browse: one HTML file, which loads nothing else.

        Parameters
        ----------
        path : path
            Ends in .html.
        most : int, default 2000
            Number of neurons, and of heads, on the page: those with most relevance.
        contexts : int, default 8
            Number of contexts of each list that are shown; all are searched.

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
        from reltrace.viz.atlas_page import atlas_page

        text = atlas_page(self, most=most, contexts=contexts)
        with with_filename(path):
            path.write_text(text, encoding="utf-8")
        return path

    def export_labels(
        self, path: str | PathLike[str], *, site: str = "neuron", most: int | None = None
    ) -> int:
        """Write labels with their contexts, for a person or a language model to improve.

        A line of JSON for each: "site", "layer", "index", "label", "by" (its author; "log-odds": it
        is built in), "mass", "made_by" (name and revision of the model), and "contexts", the
        strongest of positive relevance, each with "relevance", "activation", "text" (the token of
        its position is between ⟦ and ⟧), "token" and "target".

        Parameters
        ----------
        path : path
            The file, which is replaced; not the atlas' own file of imported labels.
        site : {"neuron", "head"}
            Of neurons or of heads.
        most : int, optional
            Number of labels at most, of those with most relevance, from 1 on; default: all.

        Returns
        -------
        int
            Number of labels.

        Raises
        ------
        InvalidArgument
            An argument is wrong; the file is unchanged.
        OSError
            The file can not be written.
        """
        count, features = 0, self.by_mass(site, most)
        self._imported.check_other(Path(path))
        with with_filename(Path(path)), Path(path).open("w", encoding="utf-8") as file:
            for feature in features:
                record = described(feature) | {"made_by": self._imported.made_by}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        return count

    def import_labels(self, path: str | PathLike[str]) -> int:
        """Import the labels of a file: all of them, or, if a line is wrong, none.

        Parameters
        ----------
        path : path
            Lines of JSON with "layer", "index" and "label", and optionally "site" (default
            "neuron"), "by", and "made_by", which must be the atlas' own; other fields are ignored.
            An empty label removes one. Labels that `export_labels` wrote and nobody changed are
            ignored.

        Returns
        -------
        int
            Number of labels that were added, changed or removed.

        Raises
        ------
        InvalidArgument
            A line is wrong; the message names it and what is allowed.
        OSError
            The file can not be read.
        """
        return self._imported.add(Path(path), self._built_in)

    def _built_in(self, key: Key) -> str:
        return label_of(self._salient(key))

    def _of(self, site: str) -> MergedSite:
        check_name(site, "site", SITES)
        return self._state.sites[site]

    def _check(self, site: str, layer: int, index: int) -> None:
        layers, _, _, features = self._of(site).values.shape
        whole_number(layer, "layer", most=layers - 1)
        whole_number(index, site, most=features - 1)

    def _salient_tokens(self, key: Key) -> list[SalientToken]:
        site, layer, index = key
        merged, which = self._of(site), LISTS.index("relevance+")
        prompts = merged.prompts[layer, which, :, index]
        positions = merged.tokens[layer, which, :, index]
        exists = prompts >= 0
        return salient_tokens(
            self._corpus, self._state, prompts[exists].tolist(), positions[exists].tolist()
        )

    def _contexts(self, key: Key, name: str, count: int) -> list[Context]:
        """Return the strongest contexts of a list, `count` or as many as there are."""
        site, layer, index = key
        merged, which = self._of(site), LISTS.index(name)
        sign = -1.0 if name.endswith("-") else 1.0
        columns = (
            array[layer, which, :count, index].tolist()
            for array in (merged.values, merged.beside, merged.prompts, merged.tokens)
        )
        contexts = []
        for value, beside, prompt, position in zip(*columns, strict=True):
            if prompt < 0:
                break
            relevance, activation = sign * value, beside
            if not name.startswith("relevance"):
                relevance, activation = activation, relevance
            tokens, target = self._corpus.context(prompt, position)
            contexts.append(Context(relevance, activation, prompt, position, tokens, target))
        return contexts
