"""Labels by hand, for tests that need no atlas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Key = tuple[str, int, int]


class FakeLabels:
    """What `Trace` needs of an atlas; as a rule, of the model of `make_trace`."""

    def __init__(
        self, texts: Mapping[Key, str] | None = None, made_by: tuple[str, ...] = ("tiny", "r1")
    ) -> None:
        self.about: dict[str, Any] = {"made_by": list(made_by)} if made_by else {}
        self.asked: list[Key] = []
        self._texts = texts

    def label(self, layer: int, index: int, site: str = "neuron") -> str:
        """Return what was given; if nothing was, a text that tells all of them apart."""
        assert type(layer) is type(index) is int
        self.asked.append((site, layer, index))
        if self._texts is None:
            return f"{site} {layer}:{index}"
        return self._texts.get((site, layer, index), "")
