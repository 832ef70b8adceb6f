"""Text that a model writes after a prompt, with and without steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reltrace_proto.v1 import types_pb2

from reltrace.types.checks import number, whole_number
from reltrace.types.edit import EditLike, edits_to_wire
from reltrace.types.prompt import Messages, set_input
from reltrace.types.provenance import Provenance, Timings
from reltrace.types.request import Job, model_name

_MOST_NEW_TOKENS = 1024
_MOST_TEMPERATURE = 100.0
_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, eq=False)
class Generation:
    """Text that a model generated after a prompt.

    Attributes
    ----------
    text : str
        The new tokens, decoded together, without special tokens.
    tokens, token_ids : list of str, list of int
        The new tokens.
    logprobs : ndarray of float32
        Log-probability of each under the model (steered, if it was), without temperature and
        top_p.
    stopped : bool
        Whether the text ended with an end-of-text token, not at `max_new_tokens`.
    prompt_tokens, prompt_token_ids, prompt_text, hints
        The prompt as the model read it, as in `Tokens`. `prompt_text` is empty if an older version
        made the text.
    provenance : Provenance
        Model and versions.
    unsteered : Generation or None
        The text of the same call without steering; None if nothing was steered.
    timings : Timings or None
        How long the job was queued and computed.
    job_id : str or None
        The job's id in the server's logs.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    logprobs: NDArray[np.float32]
    stopped: bool
    prompt_tokens: list[str]
    prompt_token_ids: list[int]
    provenance: Provenance
    prompt_text: str = ""
    hints: tuple[str, ...] = ()
    unsteered: Generation | None = None
    timings: Timings | None = None
    job_id: str | None = None

    @classmethod
    def combined(cls, texts: Sequence[object]) -> Generation:
        """Return the first of one or two generations, with the second as its `unsteered`."""
        generations = [text for text in texts if isinstance(text, Generation)]
        return replace(generations[0], unsteered=generations[1] if generations[1:] else None)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        without = "" if self.unsteered is None else f", unsteered={self.unsteered.text!r}"
        return f"Generation({self.text!r}, {len(self.tokens)} tokens{without})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from reltrace.viz.notebook import generation_html

        return generation_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain lists and numbers, ready for `json.dumps`."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs.tolist(),
            "stopped": self.stopped,
            "prompt_tokens": self.prompt_tokens,
            "prompt_token_ids": self.prompt_token_ids,
            "prompt_text": self.prompt_text,
            "hints": list(self.hints),
            "model": self.provenance.model,
            "unsteered": self.unsteered and self.unsteered.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What a model generated since the last piece.

    Attributes
    ----------
    text : str
        The decoded text; empty while a character is incomplete. All pieces of a text make up its
        `Generation.text`.
    tokens, token_ids : tuple of str, tuple of int
        The new tokens.
    steered : bool
        Whether the piece belongs to the steered text.
    again : bool
        The text starts again with this piece, because a worker was lost and another one generated
        a different text.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    steered: bool
    again: bool = False


def generation_jobs(
    prompt: str | None,
    input_ids: Sequence[int] | None,
    messages: Messages | None,
    add_special_tokens: bool,
    steer: EditLike | Sequence[EditLike],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    model: str | None,
    *,
    stream: bool = False,
) -> list[Job]:
    """Check the arguments of `generate`; return its job, and one without steering if there is any.

    With `stream`, the worker sends drafts of the text while it is generated.
    """
    edits = edits_to_wire(steer, "steer")
    wire = types_pb2.Generation(
        max_new_tokens=whole_number(max_new_tokens, "max_new_tokens", 1, _MOST_NEW_TOKENS),
        temperature=number(temperature, "temperature", 0, _MOST_TEMPERATURE),
        top_p=number(top_p, "top_p", 0, 1),
        seed=whole_number(seed, "seed", most=_LARGEST_SEED),
        stream=stream,
    )
    jobs = []
    for wanted in (edits, []) if edits else ([],):
        spec = types_pb2.JobSpec(model=model_name(model), generation=wire, edits=wanted)
        set_input(spec, prompt, input_ids, messages, add_special_tokens)
        jobs.append(Job(spec))
    return jobs
