"""Rules on instances, reversibly: one process serves every rule and the untouched model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from reltrace_worker.lrp.attention import (
    AttentionFunction,
    Packing,
    positions,
    register_attention,
)
from reltrace_worker.lrp.kernels import attention
from reltrace_worker.lrp.reproducible import setting_restored
from reltrace_worker.lrp.rule import Rule
from reltrace_worker.models.families import family_of
from reltrace_worker.types.errors import ModelError

_MISSING = object()

Patch = tuple[nn.Module, str, Callable[..., Any]]
"""A module, one of its attributes, and the function that it is to be."""


@contextmanager
def instance_forwards(patches: Iterable[Patch]) -> Iterator[None]:
    """Give modules other functions, as instance attributes, until the block ends.

    What stood there before comes back: the class's method, or an instance attribute that
    somebody else had set.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, attribute, function in patches:
            attributes = vars(module)
            before.append((attributes, attribute, attributes.get(attribute, _MISSING)))
            attributes[attribute] = function
        yield
    finally:
        for attributes, attribute, function in reversed(before):
            if function is _MISSING:
                del attributes[attribute]
            else:
                attributes[attribute] = function


def instance_forward(
    module: nn.Module, forward: Callable[..., Any]
) -> AbstractContextManager[None]:
    """Give one module another ``forward``, as :func:`instance_forwards` does."""
    return instance_forwards([(module, "forward", forward)])


def _patch(module: nn.Module, function: Callable[..., Any]) -> Patch:
    # In a model that is split over devices, accelerate's own forward moves the inputs and calls
    # what it has put aside under this name.
    split = "_hf_hook" in vars(module)
    return module, "_old_forward" if split else "forward", MethodType(function, module)


def single_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> AbstractContextManager[None]:
    """Let a model compute one logit of each row, instead of the whole vocabulary's.

    What a model does to its logits afterwards (a soft cap, a factor) is done to each by itself.
    The product is computed in float32.

    Parameters
    ----------
    model
        Its output embeddings are a linear layer.
    token_ids
        The P tokens whose logits are wanted. Logits are [1, P, 1] then.
    """

    def forward(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor(token_ids, device=hidden.device)
        logits = (hidden.float() * head.weight[wanted].float()).sum(-1, keepdim=True)
        return logits if head.bias is None else logits + head.bias[wanted, None]

    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return instance_forwards([_patch(head, forward)])


@contextmanager
def _attention_implementation(configs: Iterable[Any], name: str) -> Iterator[None]:
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def apply_rule(model: PreTrainedModel, rule: Rule) -> Iterator[None]:
    """Let the backward passes of `model` follow `rule` until the block ends.

    Only attributes of this model's instances and its config change, and all of them come back,
    also after an exception: afterwards the model computes plain values and plain gradients.
    Inside the block every forward needs the keyword ``packing``. Not for several threads on one
    model at a time.

    Parameters
    ----------
    model
        A model of a supported family.
    rule
        One of ``RULES``.

    Raises
    ------
    ModelError
        The model is of no supported family.
    """
    family = family_of(model)
    register_attention(rule.attention_name, rule.wrap_attention(attention))
    norm = rule.norm_of(family)
    patches: list[Patch] = []
    # The configs of the attention modules choose the kernel, the decoder's chooses the mask;
    # in most models they are one object.
    configs: dict[int, Any] = {}
    for module in model.modules():
        if norm is not None and isinstance(module, family.norm):
            patches.append(_patch(module, norm))
        elif rule.gated_mlp is not None and isinstance(module, family.gated_mlp):
            patches.append(_patch(module, rule.gated_mlp))
        # Not getattr: where a module has none, nn.Module searches long.
        config = vars(module).get("config")
        if config is not None:
            configs[id(config)] = config
    with (
        instance_forwards(patches),
        _attention_implementation(configs.values(), rule.attention_name),
        setting_restored(),
    ):
        yield


def verify_rule(model: PreTrainedModel, rule: Rule) -> None:
    """Prove by a probe pass that the rule's functions are the ones that the model calls.

    A kernel from a hub, a subclass or a wrapper around a module can bypass a patch; the numbers
    would still look plausible.

    Parameters
    ----------
    model
        A model of a supported family.
    rule
        One of ``RULES``.

    Raises
    ------
    ModelError
        Names the modules that were not called exactly once in a forward pass.
    """
    family = family_of(model)
    calls: Counter[int] = Counter()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls[id(module)] += 1
            return function(module, *args, **kwargs)

        return forward

    def wrap_attention(kernel: AttentionFunction) -> AttentionFunction:
        return counted(rule.wrap_attention(kernel))

    probe = replace(
        rule,
        name=f"{rule.name}_probe",
        norm=None if rule.norm is None else counted(rule.norm),
        plus_one_norm=None if rule.plus_one_norm is None else counted(rule.plus_one_norm),
        gated_mlp=None if rule.gated_mlp is None else counted(rule.gated_mlp),
        wrap_attention=wrap_attention,
    )
    packing = Packing((1, 2))
    device = next(model.parameters()).device
    with torch.no_grad(), apply_rule(model, probe):
        model(
            input_ids=torch.zeros((1, packing.tokens), dtype=torch.int64, device=device),
            position_ids=positions(packing, device),
            use_cache=False,
            logits_to_keep=1,
            packing=packing,
        )

    layers = len(family.decoder_layers(model))
    norms = family.norms_per_layer * layers + 1
    # (role, class, patched by this rule, instances at least expected)
    roles = (
        ("norm", family.norm, rule.norm_of(family) is not None, norms),
        ("gated MLP", family.gated_mlp, rule.gated_mlp is not None, layers),
        ("attention", family.attention, True, layers),
    )
    faults = []
    for role, kind, patched, expected in roles:
        if not patched:
            continue
        instances = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
        if len(instances) < expected:
            faults.append(
                f"{len(instances)} {role} modules of class {kind.__name__} instead of "
                f"at least {expected}"
            )
        faults += [
            f"{role} {name} was called {calls[id(module)]} times instead of once"
            for name, module in instances.items()
            if calls[id(module)] != 1
        ]
    if faults:
        raise ModelError(
            f"rule {rule.name!r} does not reach all of the model: "
            + "; ".join(faults[:5])
            + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        )
