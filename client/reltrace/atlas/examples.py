"""Features of an atlas, and the examples of a corpus in which they are strong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reltrace.atlas.merged import quantile
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import MEASURES
from reltrace.types.checks import check_name, number
from reltrace.types.edit import Steer, finite
from reltrace.types.errors import invalid
from reltrace.types.token_text import readable_all

BEFORE, AFTER = 24, 8
"""Tokens of a context before and after the one where the feature is strong."""

QUANTILES = (0.01, 0.5, 0.99)
"""Shares of all tokens whose values are shown."""


@dataclass(frozen=True, slots=True)
class Context:
    """An example in the corpus in which a neuron or head is strong.

    Attributes
    ----------
    relevance, activation : float
        Of the neuron or head at the position.
    prompt : int
        Number of the prompt in the corpus.
    position : int
        Position of the token in the prompt.
    tokens : tuple of str
        The prompt's tokens.
    target : str
        The token that follows, which the model is about to predict there; if the atlas explains
        one token of each prompt, that token. "" if there is none.
    """

    relevance: float
    activation: float
    prompt: int
    position: int
    tokens: tuple[str, ...]
    target: str

    def __str__(self) -> str:
        """Return the text around the token, which is between ⟦ and ⟧."""
        before, token, after = self.parts()
        return f"{before}⟦{token}⟧{after}"

    def parts(self) -> tuple[str, str, str]:
        """Return the text before the token, the token without its space, and the text after."""
        window = self.window
        texts = readable_all(self.tokens, slice(window.start, window.stop))
        at = self.position - window.start
        token = texts[at].lstrip() or texts[at]
        before = "".join(texts[: at + 1]).removesuffix(token)
        after = "".join(texts[at + 1 :])
        return (
            f"… {before}" if window.start else before,
            token,
            f"{after} …" if window.stop < len(self.tokens) else after,
        )

    def value(self, measure: str) -> float:
        """Return the "relevance" or the "activation"."""
        return self.relevance if measure == "relevance" else self.activation

    @property
    def token(self) -> str:
        """The token where it is strong."""
        return self.tokens[self.position]

    @property
    def window(self) -> range:
        """Indices of the tokens around it: 24 before, 8 after."""
        start = max(0, self.position - BEFORE)
        return range(start, min(len(self.tokens), self.position + AFTER + 1))


class ContextLists(Mapping[str, list[Context]]):
    """The contexts of a feature by the names of `LISTS`; each list is read at its first access.

    `read` returns the strongest contexts of a list, by its name and their number; `sizes` is how
    many there are.
    """

    def __init__(self, read: Callable[[str, int], list[Context]], sizes: Mapping[str, int]) -> None:
        self._read = read
        self._loaded: dict[str, list[Context]] = {}
        self.sizes = sizes

    def __getitem__(self, name: str) -> list[Context]:
        if name not in self._loaded:
            self._loaded[name] = self._read(name, self.sizes[name])
        return self._loaded[name]

    def first(self, name: str, count: int) -> list[Context]:
        """Return the strongest of a list; the others are not read."""
        return self[name] if count >= self.sizes[name] else self._read(name, count)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled with all contexts, without the atlas.
        return dict, (dict(self),)


@dataclass(frozen=True, slots=True)
class SalientToken:
    """A token that is more frequent in the contexts of a neuron or head than in the corpus.

    Attributes
    ----------
    token : str
        The token.
    role : {"at", "before", "target"}
        Where: at the context's position, among the 24 tokens before, or as the context's target.
    count, of : int
        Number of contexts that have it, and of all; several in one prompt count once for "before",
        and for "target" if the atlas explains one token of each prompt.
    score : float
        Log-odds against the corpus, in standard deviations.
    """

    token: str
    role: str
    count: int
    of: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class Feature:
    """A neuron or head of an atlas.

    Attributes
    ----------
    site : str
        "neuron" or "head".
    layer, index : int
        Decoder layer, and index in it.
    label : str
        The imported label, else one of the salient tokens; "" if there are none.
    labelled_by : str
        Author of the imported label, "" if unknown; "log-odds": it is built in.
    salient_tokens : list of SalientToken
        Of the contexts of positive relevance, the clearest first.
    contexts : mapping of str to list of Context
        "relevance+", "relevance-", "activation+", "activation-": the strongest first.
    count : int
        Number of tokens that are counted.
    mean : dict of str to float
        Mean "relevance" and "activation" of these.
    mass : float
        Sum of |R| of these.
    """

    site: str
    layer: int
    index: int
    label: str
    labelled_by: str
    salient_tokens: list[SalientToken]
    contexts: ContextLists
    count: int
    mean: dict[str, float]
    mass: float
    _histograms: dict[str, Array]

    def __repr__(self) -> str:
        called = repr(self.label) if self.label else "no label"
        return f"Feature({self.site} {self.index} of layer {self.layer}, {called})"

    def _repr_html_(self) -> str:
        from reltrace.viz.notebook import feature_html

        return feature_html(self)

    def steer(self, times: float = 1.0) -> Steer:
        """Return the steering that makes generated text speak of what this neuron stands for.

        It sets the neuron to a factor times its mean activation in the contexts of positive
        relevance.

        Parameters
        ----------
        times : float, default 1
            The factor; negative ones steer away.

        Raises
        ------
        InvalidArgument
            This is a head, or a neuron without such contexts; or `times` is not a finite number.
        """
        times = finite(times, "times")
        if self.site != "neuron":
            raise invalid(
                "site",
                f"is {self.site!r}: only a neuron can be set to an activation; instead, "
                f'reltrace.Edit("{self.site}", {self.layer}, {self.index}, scale=...) scales it',
            )
        contexts = self.contexts["relevance+"]
        if not contexts:
            raise invalid(
                self.site, f"{self.index} of layer {self.layer} has nothing to be steered by"
            )
        usual = sum(context.activation for context in contexts) / len(contexts)
        return Steer(self.layer, self.index, value=times * usual)

    def quantile(self, share: float, measure: str = "relevance") -> float:
        """Return the value below which a share of all tokens' values lies, to within its octave.

        Parameters
        ----------
        share : float
            0 to 1.
        measure : {"relevance", "activation"}
            Of which.

        Raises
        ------
        InvalidArgument
            An argument is wrong.
        """
        share = number(share, "share", 0, 1)
        check_name(measure, "measure", MEASURES)
        return quantile(self._histograms[measure], share)
