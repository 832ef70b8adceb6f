"""The settings of an atlas, and the jobs that they make of slices of a corpus."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reltrace_proto.v1 import types_pb2

from reltrace.types.checks import flag, whole_number
from reltrace.types.errors import invalid
from reltrace.types.prompt import MAX_JOB_BYTES
from reltrace.types.request import Job, Priority, model_name, wire_priority
from reltrace.types.target import is_several, to_wire

_ALL_POSITIONS = 1 << 16
"""As many as a prompt of an atlas can have."""


@dataclass(frozen=True, slots=True)
class AtlasSettings:
    """The arguments of `Client.build_atlas`, which documents them."""

    model: str | None
    rule: str
    target: Any
    k: int
    slice: int
    priority: Priority
    positions: int | None = None
    seed: int = 0
    keep_special: bool = False
    add_special_tokens: bool = True

    def check(self) -> None:
        whole_number(self.k, "k", 1, 64)
        whole_number(self.slice, "slice", 1, 1 << 16)
        whole_number(self.seed, "seed", 0, (1 << 64) - 1)
        if self.positions is None:
            if self.seed:
                raise invalid("seed", "draws positions, and none are drawn; give their number")
        else:
            whole_number(self.positions, "positions", 1, _ALL_POSITIONS)
            if self.target is not None:
                raise invalid("positions", "select next tokens to explain, and exclude a target")
        flag(self.add_special_tokens, "add_special_tokens")
        if is_several(self.target):
            raise invalid("target", "must be one, not several")
        wire_priority(self.priority)
        self.job(["x"])

    def job(self, prompts: Sequence[str | types_pb2.Chat], first: int = 0) -> Job:
        """Return the job of a slice, whose first prompt has the number `first`."""
        corpus = types_pb2.Corpus(
            prompts=[prompt if isinstance(prompt, str) else "" for prompt in prompts],
            chats={
                number: prompt
                for number, prompt in enumerate(prompts)
                if not isinstance(prompt, str)
            },
            seed=self.seed,
            keep_special=bool(self.keep_special),
        )
        if self.target is None:
            corpus.positions = self.positions or _ALL_POSITIONS
        spec = types_pb2.JobSpec(
            model=model_name(self.model),
            rule=self.rule,
            targets=() if self.target is None else to_wire(self.target),
            top_k=self.k,
            corpus=corpus,
            # Unset by default: so a server that does not know the field runs it, too.
            add_special_tokens=None if self.add_special_tokens else False,
        )
        if spec.ByteSize() > MAX_JOB_BYTES:
            raise invalid(
                "slice",
                f"{len(prompts)} prompts make a job of {spec.ByteSize()} bytes; the limit is "
                f"{MAX_JOB_BYTES}: take fewer at a time",
            )
        return Job(spec, self.target, first)

    def about(self) -> dict[str, Any]:
        """Return what must be the same for all slices of a folder, as JSON holds it."""
        target = self.target
        if target is not None:
            # A token's id stays a number, to tell it from the text of the number.
            target = operator.index(target) if hasattr(target, "__index__") else str(target)
        about = asdict(self) | {"model": self.model or "", "target": target}
        del about["priority"]
        return about
