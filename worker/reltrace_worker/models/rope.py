"""Rotary embeddings and the context length that they allow."""

from __future__ import annotations

from typing import Any

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
        if rope_type == _LONGROPE or (rope_type == _DYNAMIC and len(_parameters(config)) > 1):
            raise ModelError(
                f"rope type {rope_type!r} is not supported: its frequencies depend on the longest "
                "prompt of a pass, so a result would depend on what it was computed with"
            )
        for field in _NUMBERS & rope.keys():
            # transformers has a default of its own for null, but not for the factor.
            missing = rope[field] is None and (field != "factor" or rope_type == "default")
            if not missing and not isinstance(rope[field], int | float):
                raise ModelError(
                    f"{field} in rope_parameters (or rope_scaling) of config.json is "
                    f"{rope[field]!r}; it must be a number"
                )
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            "use_bidirectional_attention is not supported: a token's logits would depend on what "
            "follows it"
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
    """Give dynamic rotary embeddings the frequencies of prompts of one length, as vLLM does.

    Parameters
    ----------
    length
        The context length in tokens. Up to ``max_position_embeddings`` the frequencies are the
        unscaled ones.
    """
    if _parameters(model.config)[0].get("rope_type") != _DYNAMIC:
        return
    rotary: Any = model.get_submodule("model.rotary_emb")
    frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS[_DYNAMIC](
        model.config, rotary.inv_freq.device, seq_len=length
    )
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        buffer.copy_(frequencies)
    # From here on they are not updated by the length of a pass.
    rotary.rope_type = "default"
