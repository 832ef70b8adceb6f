"""Edits of the forward pass: neurons switched off or on, directions added.

An edit is part of the graph: relevance is that of the edited model. A value that was set depends
on nothing below it, so that nothing below it is relevant through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import pad

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.sites import SITES, Site
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.placement import to_device
from reltrace_worker.types.jobs import Edit

MANY_CELLS = 1024
"""Edits of up to so many cells are made together, in one step for all jobs."""

_ROWS_AT_ONCE = 8192

_mean_embeddings: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
"""By embedding module: weights do not change, and a sum over all takes a while."""


@dataclass(frozen=True, slots=True)
class EditedRows:
    """The edits of one job, in their order, and where its tokens are."""

    edits: tuple[Edit, ...]
    # Row of its first token here among all rows.
    start: int
    # Position in the job of each of its rows here: all of its tokens in a packed batch, the new
    # token where text is generated.
    positions: range


@dataclass(frozen=True, slots=True)
class _Step:
    """Edits that touch different rows, made in one go: ``x[rows, columns] * scale + add``."""

    # int64 indices that broadcast: [C] and [C], or [R, 1] and [1, width].
    rows: torch.Tensor
    columns: torch.Tensor
    # float32, of a shape that broadcasts with those.
    scale: torch.Tensor
    add: torch.Tensor

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        rows, columns, scale, add = (
            to_device(part, value.device)
            for part in (self.rows, self.columns, self.scale, self.add)
        )
        cells = value[rows, columns]
        changed = cells * scale.to(cells.dtype) + add.to(cells.dtype)
        return value.index_put((rows, columns), changed)


class EditHooks:
    """All edits of the jobs that run together; the rows of jobs do not overlap."""

    def __init__(self, loaded: LoadedModel, jobs: Sequence[EditedRows]) -> None:
        self._loaded = loaded
        # By site and layer, and there by job.
        self._edits: dict[tuple[str, int], list[list[tuple[Edit, EditedRows]]]] = {}
        self.move(jobs)

    @staticmethod
    def of(loaded: LoadedModel, batch: PackedBatch) -> EditHooks:
        starts, lengths = batch.packing.starts, batch.packing.lengths
        jobs = zip(batch.jobs, starts, lengths, strict=True)
        return EditHooks(
            loaded, [EditedRows(job.edits, start, range(n)) for job, start, n in jobs if job.edits]
        )

    def move(self, jobs: Sequence[EditedRows]) -> None:
        """Go on with other rows of the same jobs: those of the next tokens."""
        self._edits.clear()
        for job in jobs:
            of_job: dict[tuple[str, int], list[tuple[Edit, EditedRows]]] = {}
            for edit in job.edits:
                of_job.setdefault((edit.site, edit.layer), []).append((edit, job))
            for where, edits in of_job.items():
                self._edits.setdefault(where, []).append(edits)

    def edit_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Make the edits of the input embeddings, [1, N, hidden size]."""
        return self._apply(embeddings, "embed", 0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the edits of the decoder layers in every forward pass until the block ends.

        What is hooked later sees the edited tensors.
        """
        family = self._loaded.family
        layers = family.decoder_layers(self._loaded.model)
        with ExitStack() as stack:
            for site, layer in self._edits:
                hook_point = SITES[site].hook_point
                if hook_point is not None:
                    point = hook_point(family)
                    hook = partial(self._edit, point.in_place, site, layer)
                    stack.callback(point.register(layers[layer], hook).remove)
            yield

    def _edit(self, in_place: bool, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        edited = self._apply(value, site, layer)
        return value.copy_(edited) if in_place and edited is not value else edited

    def _apply(self, value: torch.Tensor, site: str, layer: int) -> torch.Tensor:
        """Make the edits of one tensor, [1, N, width] or, one row a job, [N, 1, width]."""
        jobs = self._edits.get((site, layer))
        if not jobs:
            return value
        flat = value.reshape(-1, value.shape[-1])
        width, divided = flat.shape[-1], SITES[site].axis in self._loaded.divided
        if divided:
            # Edits are of columns of the whole: those of other processes are zeros here.
            ranks = self._loaded.ranks
            first = ranks.rank * width
            flat = pad(flat, (first, (ranks.size - ranks.rank - 1) * width))
        # The first edit of every job, then the second of every job that has one, and so on.
        for level in zip_longest(*jobs):
            together = [edit for edit in level if edit is not None]
            for step in _steps(together, SITES[site], self._loaded, flat.shape[-1]):
                flat = step.apply(flat)
        if divided:
            flat = flat[:, first : first + width]
        return flat.reshape(value.shape)


def _steps(
    edits: Sequence[tuple[Edit, EditedRows]], site: Site, loaded: LoadedModel, width: int
) -> Iterator[_Step]:
    cells: list[tuple[torch.Tensor, torch.Tensor, Edit]] = []
    whole: list[tuple[torch.Tensor, Edit]] = []
    for edit, job in edits:
        rows = _rows_of(edit, job)
        if not len(rows):
            continue
        if not edit.features:
            whole.append((rows, edit))
            continue
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
        return _mean_embedding(loaded)
    if edit.direction:
        return torch.tensor(edit.direction)
    return torch.full((width,), edit.value)


def _mean_embedding(loaded: LoadedModel) -> torch.Tensor:
    """Return the mean of the input embeddings over the vocabulary: float32 [hidden size], CPU.

    Of what the embedding module gives, with the factor that some families multiply by.
    """
    module = loaded.model.get_input_embeddings()
    mean = _mean_embeddings.get(module)
    if mean is None:
        size = loaded.shape.vocab_size
        total = torch.zeros(loaded.shape.hidden_size, dtype=torch.float64)
        with torch.no_grad():
            for ids in torch.split(torch.arange(size, device=loaded.device), _ROWS_AT_ONCE):
                total += module(ids).float().sum(0).cpu()
        mean = _mean_embeddings[module] = (total / size).float()
    return mean


def _rows_of(edit: Edit, job: EditedRows) -> torch.Tensor:
    here = job.positions
    positions = here if not edit.positions else sorted(set(edit.positions) & set(here))
    return torch.tensor([job.start + p - here.start for p in positions], dtype=torch.int64)
