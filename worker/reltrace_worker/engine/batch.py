"""Jobs that share a pass: their tokens behind one another in one sequence, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reltrace_worker.lrp.attention import Packing, positions
from reltrace_worker.models.placement import to_device
from reltrace_worker.types.jobs import TraceJob


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Jobs of one rule that share a forward pass over N rows."""

    # In the order of their rows.
    jobs: tuple[TraceJob, ...]
    packing: Packing

    @staticmethod
    def of(jobs: Sequence[TraceJob]) -> PackedBatch:
        return PackedBatch(tuple(jobs), Packing(tuple(len(job.token_ids) for job in jobs)))

    @property
    def backward_passes(self) -> int:
        """The number of targets of each job whose relevance is asked for; 1 unless it is alone."""
        (passes,) = {len(job.targets) for job in self.jobs}
        return passes

    def token_ids(self, device: torch.device) -> torch.Tensor:
        """Return the token ids, int64 [1, N]."""
        ids = torch.tensor([[i for job in self.jobs for i in job.token_ids]])
        return to_device(ids, device)

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Return the position ids, int64 [1, N], which restart at 0 with each job."""
        return positions(self.packing, device)
