"""Changes of what flows through the model: neurons switched off or on, directions added.

An edit is part of the graph: relevance is that of the edited model. A value that was set depends
on nothing below it, so that nothing below it is relevant through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from reltrace_worker.engine.sites import SITES, Side, Site, Tap
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.types.jobs import Edit

MANY_CELLS = 1024
"""Of one edit. Edits of fewer are made together, in one step for all jobs."""

_ROWS_AT_ONCE = 8192

_means: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
"""Mean embeddings by embedding module: weights do not change, and a sum over all takes a while."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The edits of one job, and where its tokens are.

    Parameters
    ----------
    edits
        In the order in which they are made; positions count from 0.
    start
        Row of its first token here among all rows.
    positions
        Position in the job of each of its rows here: all of its tokens in a pack, the new one
        where tokens are generated.
    """

    edits: tuple[Edit, ...]
    start: int
    positions: range


@dataclass(frozen=True, slots=True)
class _Step:
    """Edits that touch different rows: made in one go. ``x[rows, columns] * scale + add``.

    Parameters
    ----------
    rows, columns
        int64 indices that broadcast: [C] and [C], or [R, 1] and [1, width].
    scale, add
        float32, of a shape that broadcasts with those.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    add: torch.Tensor

    def made(self, value: torch.Tensor) -> torch.Tensor:
        rows, columns = self.rows.to(value.device), self.columns.to(value.device)
        found = value[rows, columns]
        changed = found * self.scale.to(found) + self.add.to(found)
        return value.index_put((rows, columns), changed)


class Edits:
    """All edits of the jobs that run together.

    Parameters
    ----------
    loaded
        The model.
    jobs
        Their rows do not overlap.
    """

    def __init__(self, loaded: LoadedModel, jobs: Sequence[Rows]) -> None:
        self._loaded = loaded
        self._by_place: dict[tuple[str, int], list[list[tuple[Edit, Rows]]]] = {}
        self.move(jobs)

    def move(self, jobs: Sequence[Rows]) -> None:
        """Go on with other rows of the same jobs: the next tokens that they write."""
        self._by_place.clear()
        for job in jobs:
            places: dict[tuple[str, int], list[tuple[Edit, Rows]]] = {}
            for edit in job.edits:
                places.setdefault((edit.site, edit.layer), []).append((edit, job))
            for place, edits in places.items():
                self._by_place.setdefault(place, []).append(edits)

    def embedded(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Make the edits of the input embeddings, [1, N, hidden size]."""
        return self._made(embeddings, "embed", 0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the edits of the decoder layers in every forward pass until the block ends.

        What is hooked later sees the edited tensors.
        """
        layers = self._loaded.family.decoder_layers(self._loaded.model)
        handles: list[RemovableHandle] = []
        try:
            for name, layer in self._by_place:
                tap = SITES[name].tap
                if tap is not None:
                    there = tap(self._loaded.family)
                    handles.append(self._hook(there, layers[layer], name, layer))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, tap: Tap, decoder: nn.Module, site: str, layer: int) -> RemovableHandle:
        module = tap.module(decoder)
        if tap.side is Side.INPUT:

            def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                made = self._made(args[0], site, layer)
                if tap.passes_by and made is not args[0]:
                    made = args[0].copy_(made)
                return (made, *args[1:])

            return module.register_forward_pre_hook(before)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._made(output[0], site, layer), *output[1:])
            return self._made(output, site, layer)

        return module.register_forward_hook(after)

    def _made(self, value: torch.Tensor, site: str, layer: int) -> torch.Tensor:
        """Make the edits of one tensor, [1, N, width] or, one row a job, [N, 1, width]."""
        jobs = self._by_place.get((site, layer))
        if not jobs:
            return value
        flat = value.reshape(-1, value.shape[-1])
        # The first edit of every job, then the second of every job that has one, and so on.
        for level in zip_longest(*jobs):
            together = [edit for edit in level if edit is not None]
            for step in _steps(together, SITES[site], self._loaded, flat.shape[-1]):
                flat = step.made(flat)
        return flat.reshape(value.shape)


def _steps(
    edits: Sequence[tuple[Edit, Rows]], site: Site, loaded: LoadedModel, width: int
) -> Iterator[_Step]:
    cells: list[tuple[torch.Tensor, torch.Tensor, Edit]] = []
    whole: list[tuple[torch.Tensor, Edit]] = []
    for edit, job in edits:
        rows = _rows(edit, job)
        if not len(rows):
            continue
        if edit.features:
            # Each once: the gradient of a cell that is written twice would be counted twice.
            features = sorted(set(edit.features))
            columns = [c for f in features for c in site.columns(f, loaded.shape, width)]
            if len(rows) * len(columns) > MANY_CELLS:
                # By rows and columns: an index of every cell would take more than the cells.
                yield _Step(
                    rows[:, None],
                    torch.tensor(columns)[None],
                    torch.full((1, 1), edit.scale),
                    torch.full((1, 1), edit.value),
                )
                continue
            grid = torch.cartesian_prod(rows, torch.tensor(columns))
            cells.append((grid[:, 0], grid[:, 1], edit))
        else:
            whole.append((rows, edit))
    if cells:
        counts = torch.tensor([len(rows) for rows, _, _ in cells])
        scales = torch.tensor([edit.scale for _, _, edit in cells])
        values = torch.tensor([edit.value for _, _, edit in cells])
        yield _Step(
            torch.cat([rows for rows, _, _ in cells]),
            torch.cat([columns for _, columns, _ in cells]),
            scales.repeat_interleave(counts),
            values.repeat_interleave(counts),
        )
    if whole:
        counts = torch.tensor([len(rows) for rows, _ in whole])
        scales = torch.tensor([edit.scale for _, edit in whole])
        adds = torch.stack([_added(edit, loaded, width) for _, edit in whole])
        yield _Step(
            torch.cat([rows for rows, _ in whole])[:, None],
            torch.arange(width)[None],
            scales.repeat_interleave(counts)[:, None],
            adds.repeat_interleave(counts, dim=0),
        )


def _added(edit: Edit, loaded: LoadedModel, width: int) -> torch.Tensor:
    if edit.mean:
        return mean_embedding(loaded)
    if edit.direction:
        return torch.tensor(edit.direction)
    return torch.full((width,), edit.value)


def mean_embedding(loaded: LoadedModel) -> torch.Tensor:
    """Return the mean of the input embeddings over the vocabulary: float32 [hidden size], CPU.

    Of what the embedding module gives, with the factor that some families multiply by.
    """
    module = loaded.model.get_input_embeddings()
    mean = _means.get(module)
    if mean is None:
        size = loaded.shape.vocab_size
        total = torch.zeros(loaded.shape.hidden_size, dtype=torch.float64)
        with torch.no_grad():
            for ids in torch.split(torch.arange(size, device=loaded.device), _ROWS_AT_ONCE):
                total += module(ids).float().sum(0).cpu()
        mean = _means[module] = (total / size).float()
    return mean


def _rows(edit: Edit, job: Rows) -> torch.Tensor:
    here = job.positions
    wanted = here if not edit.positions else sorted(set(edit.positions) & set(here))
    return torch.tensor([job.start + p - here.start for p in wanted], dtype=torch.int64)
