"""Rules on instances: reversible, complete, one process for all of them."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from reference.loaded import Checkpoints
from reltrace_worker.lrp import RULES, apply_rule, verify_rule
from reltrace_worker.lrp.attention import Packing, positions
from reltrace_worker.lrp.patching import instance_forward
from reltrace_worker.types.errors import ModelError
from torch import nn

PACKING = Packing((3, 4))


def gradient(model: Any, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last position of a pack, and d(largest)/d(embeddings)."""
    ids = torch.tensor([[3, 14, 15, 92, 65, 35, 89]], device=model.device)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    # Without a cache, transformers sees by the position ids where a prompt of a pack begins.
    more: dict[str, Any] = {"use_cache": False} | ({"packing": PACKING} if packed else {})
    place = positions(PACKING, model.device)
    logits = model(inputs_embeds=embeddings, position_ids=place, **more).logits[0, -1]
    (grad,) = torch.autograd.grad(logits.max(), embeddings)
    return logits.detach(), grad


@pytest.mark.parametrize("name", RULES)
def test_a_rule_changes_gradients_and_not_values(checkpoints: Checkpoints, name: str) -> None:
    """
    Given a model and the plain gradient of a pack under transformers' own block mask
    If a rule is applied
    I expect the same logits; other gradients under the LRP rules; and both plain again after it.
    """
    model = checkpoints.loaded("grouped").model
    plain = gradient(model, packed=False)
    with apply_rule(model, RULES[name]):
        logits, grad = gradient(model, packed=True)
    assert torch.allclose(logits, plain[0], atol=1e-4)
    same = torch.allclose(grad, plain[1], atol=1e-4)
    assert same == (name == "gradient")
    again = gradient(model, packed=False)
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])


def test_rules_can_be_nested_and_survive_an_exception(checkpoints: Checkpoints) -> None:
    model = checkpoints.loaded("grouped").model
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    kernel = model.config._attn_implementation
    with apply_rule(model, RULES["attnlrp"]):
        outer = gradient(model, packed=True)[1]
        with apply_rule(model, RULES["cp_lrp"]):
            assert not torch.allclose(gradient(model, packed=True)[1], outer)
        with pytest.raises(KeyError), apply_rule(model, RULES["cp_lrp"]):
            raise KeyError
        assert torch.equal(gradient(model, packed=True)[1], outer)
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    assert model.config._attn_implementation == kernel


def test_a_forward_that_somebody_else_had_set_comes_back() -> None:
    module = nn.Linear(2, 2)

    def theirs(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    method = MethodType(theirs, module)
    module.forward = method  # type: ignore[method-assign]
    with instance_forward(module, lambda x: x + 1):
        assert module(torch.tensor(1)) == 2
    assert vars(module)["forward"] is method


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("recipe", ["plain", "grouped", "tied", "llama3_rope"])
def test_the_probe_passes_on_every_kind_of_model(
    checkpoints: Checkpoints, recipe: str, name: str
) -> None:
    verify_rule(checkpoints.loaded(recipe).model, RULES[name])


@pytest.mark.parametrize(
    ("path", "rules"),
    [
        ("model.layers.1.mlp", ["attnlrp", "cp_lrp"]),
        ("model.layers.2.input_layernorm", ["attnlrp", "cp_lrp"]),
        ("model.norm", ["attnlrp", "cp_lrp"]),
    ],
)
def test_the_probe_finds_a_module_whose_patch_is_bypassed(
    checkpoints: Checkpoints, path: str, rules: list[str]
) -> None:
    """
    Given a module whose call goes to its class (a fused kernel does the like)
    If the rules are verified
    I expect an error that names the module.
    """
    model = checkpoints.loaded("grouped").model
    module = model.get_submodule(path)
    original = type(module)

    class Bypass(original):  # type: ignore[misc, valid-type]
        def __call__(self, hidden_states: torch.Tensor) -> Any:
            return original.forward(self, hidden_states)

    module.__class__ = Bypass
    try:
        for name in rules:
            with pytest.raises(ModelError, match=rf"{path} .* was called 0 times instead of"):
                verify_rule(model, RULES[name])
    finally:
        module.__class__ = original
    for name in rules:
        verify_rule(model, RULES[name])


@pytest.mark.parametrize("name", RULES)
def test_the_probe_finds_attention_of_another_kind(checkpoints: Checkpoints, name: str) -> None:
    """An attention that computes by itself never reaches the registered kernel."""
    model = checkpoints.loaded("grouped").model
    layer = model.get_submodule("model.layers.3")

    class Own(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    original = layer.self_attn
    layer.self_attn = Own()
    try:
        with pytest.raises(ModelError, match="3 modules of class LlamaAttention"):
            verify_rule(model, RULES[name])
    finally:
        layer.self_attn = original
