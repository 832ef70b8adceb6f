"""Rotary embeddings and the context length that they allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reltrace_worker.types.errors import ModelError

# transformers chooses the frequencies of these types by the longest position of a forward pass: in
# a pack, a result would depend on its neighbours.
_DYNAMIC, _LONGROPE = "dynamic", "longrope"
# Fields that transformers computes with, but does not check, or only warns of.
_NUMBERS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
    }
)


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
        for field in _NUMBERS & rope.keys():
            # transformers has a default of its own for null, but not for the factor.
            missing = rope[field] is None and (field != "factor" or rope_type == "default")
            if not missing and not isinstance(rope[field], int | float):
                raise ModelError(
                    f"{field} in rope_parameters (or rope_scaling) of config.json is "
                    f"{rope[field]!r}; it must be a number"
                )
        if rope_type == _LONGROPE:
            _check_longrope(rope)
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            "use_bidirectional_attention is not supported: a token's logits would depend on what "
            "follows it"
        )


def _check_longrope(rope: dict[str, Any]) -> None:
    for field in ("short_factor", "long_factor"):
        factors = rope.get(field)
        if not isinstance(factors, list) or not all(isinstance(x, int | float) for x in factors):
            raise ModelError(
                f"{field} in rope_parameters (or rope_scaling) of config.json is {factors!r}; it "
                "must be a list of numbers"
            )
    original = rope.get("original_max_position_embeddings")
    if not original or original < 1:
        raise ModelError(
            f"original_max_position_embeddings in config.json is {original!r}; rope type "
            "'longrope' needs a number of at least 1"
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
            longest = ropes[0].get("original_max_position_embeddings") or longest
        longest *= ropes[0].get("factor") or 1.0
    if requested is not None and not 1 <= requested <= longest:
        raise ModelError(
            f"a context length of {requested} is not possible; of this model, allowed: 1 to "
            f"{int(longest)} tokens"
        )
    return int(longest) if requested is None else requested


def fix_frequencies(model: PreTrainedModel, length: int) -> None:
    """Let the frequencies of rotary embeddings not depend on the other prompts of a pass.

    Dynamic ones get those of prompts of one length, as in vLLM. Of longrope, every prompt gets the
    frequencies that it has alone: the long ones beyond ``original_max_position_embeddings``.

    Parameters
    ----------
    length
        The context length in tokens. Up to ``max_position_embeddings`` the frequencies of dynamic
        embeddings are the unscaled ones.
    """
    parameters = _parameters(model.config)[0]
    rope_type = parameters.get("rope_type")
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
    original = int(parameters["original_max_position_embeddings"])
    if length > original:
        tables = (frequencies(original)[0], frequencies(original + 1)[0])
        # accelerate keeps the forward of a split model's module under this name.
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
