"""Applies rules to the instances of a model, reversibly, and proves that they are called.

LXT patches classes, for the whole process; here one process serves every rule and the plain model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from reltrace_worker.lrp.attention import (
    Packing,
    packed_attention,
    positions,
    register_attention,
)
from reltrace_worker.lrp.deterministic import setting_restored
from reltrace_worker.lrp.rules import Rule
from reltrace_worker.models.families import family_of
from reltrace_worker.types.errors import ModelError

_MISSING = object()

Patch = tuple[nn.Module, str, Callable[..., Any]]
"""A module, one of its methods, and the function that replaces it."""


@contextmanager
def patched(patches: Iterable[Patch]) -> Iterator[None]:
    """Replace methods of instances until the block ends, also by an exception.

    Then a function that the instance itself had is restored; another is deleted, so that the
    class's method is visible again.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, function in patches:
            attributes = vars(module)
            before.append((attributes, name, attributes.get(name, _MISSING)))
            attributes[name] = function
        yield
    finally:
        for attributes, name, function in reversed(before):
            if function is _MISSING:
                del attributes[name]
            else:
                attributes[name] = function


def instance_forward(
    module: nn.Module, forward: Callable[..., Any]
) -> AbstractContextManager[None]:
    """Replace the ``forward`` of one module until the block ends."""
    return patched([(module, "forward", forward)])


def _method(module: nn.Module, name: str, function: Callable[..., Any]) -> Patch:
    if name == "forward" and "_hf_hook" in vars(module):
        # The model is split over devices: accelerate has replaced `forward` by a function that
        # moves the inputs and calls the original, which it keeps under this name.
        name = "_old_forward"
    return module, name, MethodType(function, module)


def single_logits(model: PreTrainedModel, token_ids: torch.Tensor) -> AbstractContextManager[None]:
    """Let a model compute one logit per row, that of its token, in float32: logits are [1, P, 1].

    `token_ids` is int64 [P]. What a model does to its logits afterwards (a soft cap, a factor) is
    done to each by itself.
    """

    def forward(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        wanted = token_ids.to(hidden.device)
        logits = (hidden.float() * head.weight[wanted].float()).sum(-1, keepdim=True)
        return logits if head.bias is None else logits + head.bias[wanted, None]

    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return patched([_method(head, "forward", forward)])


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

    Only attributes of this model's instances and its configs change, and all of them are restored.
    Inside the block every forward pass needs the keyword ``packing``. One model can be used by one
    thread at a time.
    """
    attention = f"reltrace_{rule.functions}_{rule.name}"
    register_attention(attention, rule.wrap_attention(packed_attention))
    patches: list[Patch] = []
    # The configs of the attention modules select the kernel, the decoder's selects the mask;
    # in most models they are one object.
    configs: dict[int, Any] = {}
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind in rule.patches:
                patches.append(_method(module, *rule.patches[kind]))
                break
        # Not getattr: for an attribute that a module does not have, nn.Module searches long.
        config = vars(module).get("config")
        if config is not None:
            configs[id(config)] = config
    with (
        patched(patches),
        _attention_implementation(configs.values(), attention),
        setting_restored(),
    ):
        yield


def verify_rule(model: PreTrainedModel, rule: Rule) -> None:
    """Prove by a probe pass that the rule's functions are the ones that the model calls.

    A kernel from a hub, a subclass or a wrapper around a module can bypass a patch; the numbers
    would still look plausible.

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

    probe = replace(
        rule,
        name=f"{rule.name}_probe",
        patches={
            # Attention is counted where its kernel is called.
            kind: (name, f if kind is family.attention else counted(f))
            for kind, (name, f) in rule.patches.items()
        },
        wrap_attention=lambda kernel: counted(rule.wrap_attention(kernel)),
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
    expected = {
        family.norm: family.norms_per_layer * layers + 1,
        family.gated_mlp: layers,
        family.attention: layers,
    }
    faults = []
    for kind, least in expected.items():
        if kind is not family.attention and kind not in rule.patches:
            continue
        instances = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
        if len(instances) < least:
            faults.append(
                f"{len(instances)} modules of class {kind.__name__} instead of at least {least}"
            )
        faults += [
            f"{name} ({kind.__name__}) was called {calls[id(module)]} times instead of once"
            for name, module in instances.items()
            if calls[id(module)] != 1
        ]
    if faults:
        raise ModelError(
            f"rule {rule.name!r} does not reach all of the model ({len(faults)} faults): "
            + "; ".join(faults[:5])
        )
