"""Rotary embeddings and the context length that they allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from reltrace_worker.types.errors import ModelError

# transformers chooses the frequencies of these types by the longest position of a forward pass: in
# a pack, a result would depend on its neighbours.
_DYNAMIC, _LONGROPE = "dynamic", "longrope"
_ORIGINAL = "original_max_position_embeddings"
# transformers computes with these fields, but does not check them, or only warns.
_TYPES = get_type_hints(RopeParameters)
_NUMBERS = {field for field, kind in _TYPES.items() if kind in (float | None, int | None)}


def check_config(config: Any) -> None:
    """Refuse settings of a supported architecture under which a trace would be wrong.

    Raises
    ------
    ModelError
        The rotary embeddings are of an unknown type, have a field that is not a number, or would
        depend on the other prompts of a pass; or the attention is not causal.
    """
    for rope in _parameters(config):
        rope_type = str(rope.get("rope_type", "default"))
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ModelError(f"rope type {rope_type!r} in config.json is unknown")
        if rope_type in (_DYNAMIC, _LONGROPE) and len(_parameters(config)) > 1:
            raise ModelError(
                f"rope type {rope_type!r} is not supported in a model whose layers have different "
                "rotary embeddings: its frequencies depend on the longest prompt of a pass"
            )
        # For the others transformers has a default of its own in the place of null.
        needed = {_LONGROPE: {"factor", _ORIGINAL}, "default": set()}.get(rope_type, {"factor"})
        for field in _NUMBERS & rope.keys():
            if rope[field] is not None or field in needed:
                _check_type(rope, field, int | float, "a number")
        for field in ("short_factor", "long_factor") if rope_type == _LONGROPE else ():
            _check_type(rope, field, list, "a list of numbers")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            "use_bidirectional_attention is not supported: a token's logits would depend on what "
            "follows it"
        )


def _check_type(rope: dict[str, Any], field: str, kind: Any, name: str) -> None:
    if not isinstance(rope.get(field), kind):
        raise ModelError(
            f"{field} in rope_parameters (or rope_scaling) of config.json is {rope.get(field)!r}; "
            f"it must be {name}"
        )


def _parameters(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of the rotary embeddings, one for each kind of layer."""
    rope: dict[str, Any] = config.rope_parameters or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def context_length(config: Any, requested: int | None = None) -> int:
    """Return how many tokens a prompt may have: `requested`, or as many as the model allows.

    Scaled rotary embeddings reach further than ``max_position_embeddings``, by the rule of vLLM
    (``_get_and_verify_max_len``): linear and dynamic ones to its multiple by their factor, yarn to
    the multiple of the length before scaling. For llama3, longrope and Gemma 3 it is already the
    length after scaling.

    Raises
    ------
    ModelError
        More is requested than the model allows.
    """
    longest = float(config.max_position_embeddings)
    ropes = _parameters(config)
    if len(ropes) == 1 and ropes[0].get("rope_type") in ("linear", "yarn", _DYNAMIC):
        if ropes[0]["rope_type"] == "yarn":
            longest = ropes[0].get(_ORIGINAL) or longest
        longest *= ropes[0].get("factor") or 1.0
    if requested is not None and not 1 <= requested <= longest:
        raise ModelError(
            f"a context length of {requested} is not possible; of this model, allowed: 1 to "
            f"{int(longest)} tokens"
        )
    return int(longest) if requested is None else requested


def longrope_limit(config: Any) -> int | None:
    """Return the length beyond which a prompt has the long frequencies of longrope."""
    rope = _parameters(config)[0]
    return int(rope[_ORIGINAL]) if rope.get("rope_type") == _LONGROPE else None


def fix_frequencies(model: PreTrainedModel, length: int) -> None:
    """Make the frequencies of rotary embeddings independent of the other prompts of a pass.

    Dynamic ones get those of prompts of one length, the context's, as in vLLM; up to
    ``max_position_embeddings`` these are the unscaled ones. Of longrope, every prompt gets the
    frequencies that it has alone: the long ones beyond ``original_max_position_embeddings``.
    """
    rope_type = _parameters(model.config)[0].get("rope_type")
    if rope_type not in (_DYNAMIC, _LONGROPE):
        return
    rotary: Any = model.get_submodule("model.rotary_emb")

    def frequencies(tokens: int) -> tuple[torch.Tensor, float]:
        return ROPE_INIT_FUNCTIONS[rope_type](model.config, rotary.inv_freq.device, seq_len=tokens)

    # From here on transformers does not update them by the length of a pass.
    rotary.rope_type = "default"
    if rope_type == _DYNAMIC:
        fixed, rotary.attention_scaling = frequencies(length)
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            buffer.copy_(fixed)
        return
    original = longrope_limit(model.config)
    if original is not None and length > original:
        tables = (frequencies(original)[0], frequencies(original + 1)[0])
        # accelerate keeps the forward of a module under this name (lrp/patching.py).
        name = "_old_forward" if "_hf_hook" in vars(rotary) else "forward"
        vars(rotary)[name] = _longrope_forward(rotary, original, *tables)


def _longrope_forward(
    rotary: Any, original: int, short: torch.Tensor, long: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    plain = type(rotary).forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary.inv_freq.copy_(short)
        cos, sin = plain(rotary, x, position_ids)
        rotary.inv_freq.copy_(long)
        long_cos, long_sin = plain(rotary, x, position_ids)
        is_long = _prompt_lengths(position_ids)[..., None] > original
        return torch.where(is_long, long_cos, cos), torch.where(is_long, long_sin, sin)

    return forward


def _prompt_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return for each token how long its prompt is, which begins at position 0 of its row."""
    prompt = (position_ids == 0).cumsum(-1)
    last = torch.zeros_like(position_ids[:, :1]).repeat(1, position_ids.shape[1] + 1)
    last.scatter_reduce_(1, prompt, position_ids, "amax")
    return last.gather(1, prompt) + 1
