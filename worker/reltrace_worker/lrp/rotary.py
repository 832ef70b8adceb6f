"""Rotary embeddings and the factors of a rule as one function of query, key and value.

transformers rotates queries and keys in the ``forward`` of its attention modules, by ten
operations, and twelve in the backward pass. Under a rule that ``forward`` runs with another
``apply_rotary_pos_emb``, which hands the states on unrotated, and the rule's attention function
rotates them: the backward pass turns the gradients back and multiplies them by the rule's factors
in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from reltrace_worker.lrp.ops import elementwise, is_compiled, scale_gradients

Factors = tuple[float, float, float]
"""By which the gradients of query, key and value are multiplied."""

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, [1, heads or key-value heads, N, head size] each."""


@dataclass(frozen=True, slots=True)
class Unrotated:
    """Queries or keys and the tables that rotate them.

    Not a tensor, so that code which would compute with unrotated states fails.
    """

    # [1, heads, N, head size]
    states: torch.Tensor
    # [1, N, rotated part of a head]
    cos: torch.Tensor
    sin: torch.Tensor


def _hand_on(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[Unrotated, Unrotated]:
    return Unrotated(query, cos, sin), Unrotated(key, cos, sin)


def forward_without_rotation(kind: type[nn.Module]) -> FunctionType:
    """Return the ``forward`` of an attention class that calls attention with `Unrotated` states.

    A class that does not call ``apply_rotary_pos_emb`` keeps what it does.
    """
    forward: Any = kind.forward
    namespace = {**forward.__globals__, "apply_rotary_pos_emb": _hand_on}
    copy = FunctionType(
        forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first part of each head of [1, N, heads, size], by tables [1, N, 1, part]."""
    part = states[..., : cos.shape[-1]]
    turned = (part * cos + _half_turned(part) * sin).to(states.dtype)
    return _with_rest(turned, states)


def _rotated_back(
    outer: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factor: float
) -> torch.Tensor:
    """Return the gradient of `_rotated`, times `factor`."""
    part = outer[..., : cos.shape[-1]]
    # The transpose of a half turn is its negative.
    turned = (part * cos - _half_turned(part * sin)).to(outer.dtype)
    return _with_rest(turned, outer) * factor


def _with_rest(turned: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    width = turned.shape[-1]
    if width == states.shape[-1]:
        return turned
    return torch.cat((turned, states[..., width:]), dim=-1)


def _by_token(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


# Concatenated by heads, the three are one kernel.
@elementwise
def _states_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: Any, sin: Any
) -> torch.Tensor:
    return torch.cat((_rotated(query, cos, sin), _rotated(key, cos, sin), value), dim=2)


@elementwise
def _states_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: Any, sin: Any,
    for_query: float, for_key: float, for_value: float,
) -> torch.Tensor:  # fmt: skip
    turned = _rotated_back(query, cos, sin, for_query), _rotated_back(key, cos, sin, for_key)
    return torch.cat((*turned, value * for_value), dim=2)


class _States(torch.autograd.Function):
    """Rotated query and key, and value; gradients times `factors`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, factors: Factors,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        ctx.save_for_backward(cos, sin)
        ctx.factors = factors
        # Those of constants would be made as zeros.
        ctx.set_materialize_grads(ctx.needs_input_grad[0])
        q, k, v = _by_token(query, key, value)
        if is_compiled():
            states = _states_forward(q, k, v, cos, sin)
            return _by_token(*states.split((q.shape[2], k.shape[2], v.shape[2]), dim=2))
        return *_by_token(_rotated(q, cos, sin), _rotated(k, cos, sin)), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor | None, ...]:
        for_query, for_key, for_value = ctx.factors
        if not ctx.needs_input_grad[0]:
            value = outer[2]
            return None, None, value if for_value == 1.0 else value * for_value, None, None, None
        q, k, v = _by_token(*outer)
        cos, sin = ctx.saved_tensors
        if is_compiled():
            states = _states_backward(q, k, v, cos, sin, *ctx.factors)
            turned = states.split((q.shape[2], k.shape[2], v.shape[2]), dim=2)
        else:
            turned = (
                _rotated_back(q, cos, sin, for_query),
                _rotated_back(k, cos, sin, for_key),
                v * for_value,
            )
        return *_by_token(*turned), None, None, None


def attention_states(query: Any, key: Any, value: torch.Tensor, factors: Factors) -> States:
    """Rotate queries and keys, and multiply the gradients of all three by `factors`.

    Parameters
    ----------
    query, key
        `Unrotated`, or tensors of a layer without rotary embeddings.
    value
        [1, key-value heads, N, head size].
    """
    if isinstance(query, Unrotated):
        tensors = _States.apply(  # type: ignore[no-untyped-call]
            query.states, key.states, value, query.cos, query.sin, factors
        )
    else:
        tensors = scale_gradients(factors, query, key, value)
    query, key, value = tensors
    return query, key, value


def held_attention_states(query: Any, key: Any, value: torch.Tensor) -> States:
    """Rotate queries and keys, which are constants to the backward pass."""
    if not isinstance(query, Unrotated):
        return query.detach(), key.detach(), value
    tables = query.cos, query.sin
    held = Unrotated(query.states.detach(), *tables), Unrotated(key.states.detach(), *tables)
    query, key, value = attention_states(*held, value, (1.0, 1.0, 1.0))
    return query.detach(), key.detach(), value
