"""Where the time of a pass goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

PHASES = ("forward", "backward", "transfer")


@dataclass(frozen=True, slots=True)
class _Mark:
    phase: str
    at: float
    event: torch.cuda.Event | None


class PassClock:
    """Times the phases of one pass.

    On CUDA by events between the kernels: a clock of the host would time how fast kernels are
    queued, and to wait for them would cost what is measured.

    Parameters
    ----------
    device
        Of the model's first layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[_Mark] = []

    def begins(self, phase: str) -> None:
        """Note that a phase begins, and the one before it ends."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._marks.append(_Mark(phase, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, once the device has done all of them."""
        self.begins("")
        if self._marks[-1].event is not None:
            self._marks[-1].event.synchronize()
        found = dict.fromkeys(PHASES, 0.0)
        for begin, end in zip(self._marks, self._marks[1:], strict=False):
            if begin.event is not None and end.event is not None:
                found[begin.phase] += begin.event.elapsed_time(end.event) / 1000
            else:
                found[begin.phase] += end.at - begin.at
        return found
