"""LXT's documented example ("Latent Feature Attribution"), run prompt by prompt.

The other side of parity tests: it imports nothing of reltrace. It follows
https://lxt.readthedocs.io (Latent Feature Attribution): lxt patches the classes of one
modeling module, forward hooks with ``retain_grad`` save what the decoder layers put out,
one prompt after another. The patches are lxt's own maps, those of its ``models/llama.py``,
``qwen2.py``, ``qwen3.py`` and ``gemma3.py``; lxt has none for Mistral, whose classes compute as
LLaMA's do and get LLaMA's. Four things differ from the page:

- the backward pass starts at 1, not at the logit (which only multiplies every number by it);
- no checkpointing (it changes memory, not numbers);
- lxt 2.1's model zoo does not import as a whole beside transformers 5, so that of its modules
  only the one of the family is imported;
- lxt's ``patch_attention`` replaces transformers' attention registry by a plain dict, which
  transformers 5 calls methods on, so the wrapped functions are put into a registry instead.

Run: ``python lxt_example.py --model DIR --input IN.json --out OUT.npz``; ``--model`` and ``--out``
can be given several times, in the same order, for several models, and so can ``--rule``. A patch
can not be undone: each rule and family gets a process of its own, forked before it. IN.json is a
list; an item is a prompt or a list of token ids. For item i, OUT.npz holds ``resid_i``
[layers, tokens], ``embed_i`` [tokens], ``token_id_i`` and ``logit_i``; with ``--inner`` also
``head_i`` [layers, heads] and ``neuron_i`` [layers, intermediate size], summed over tokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# In the place of lxt's model zoo: its modules can be imported, its __init__ does not run.
zoo = ModuleType("lxt.efficient.models")
zoo.get_default_map = None
zoo.__path__ = [str(Path(find_spec("lxt").origin).parent / "efficient" / "models")]
sys.modules["lxt.efficient.models"] = zoo
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lxt: zennit is not installed
    from lxt.efficient.patches import cp_wrap_attention_forward, wrap_attention_forward

# Model type to the names of transformers' and of lxt's module.
FAMILIES = {
    "llama": ("llama", "llama"),
    "mistral": ("mistral", "llama"),
    "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen3"),
    "gemma3_text": ("gemma3", "gemma3"),
}


def patch_attention(module: ModuleType, wrap: Any) -> None:
    """lxt's ``patch_attention``, for a registry that is not a dict."""
    module.eager_attention_forward = wrap(module.eager_attention_forward)
    registry = type(module.ALL_ATTENTION_FUNCTIONS)()
    for key, function in module.ALL_ATTENTION_FUNCTIONS.items():
        registry[key] = wrap(function)
    module.ALL_ATTENTION_FUNCTIONS = registry


def patch(rule: str, model_type: str) -> None:
    """lxt's map ``attnLRP`` or ``cp_LRP`` of a family."""
    ours, theirs = FAMILIES[model_type]
    modeling = importlib.import_module(f"transformers.models.{ours}.modeling_{ours}")
    maps = importlib.import_module(f"lxt.efficient.models.{theirs}")
    name, wrap = {
        "attnlrp": ("attnLRP", wrap_attention_forward),
        "cp_lrp": ("cp_LRP", cp_wrap_attention_forward),
    }[rule]
    for target, apply in getattr(maps, name).items():
        if isinstance(target, ModuleType):
            patch_attention(modeling, wrap)
            continue
        # LlamaMLP stands for MistralMLP, and Dropout for itself.
        mirror = target.__name__.replace("Llama", "Mistral") if ours == "mistral" else ""
        if not apply(getattr(modeling, mirror, target)):
            raise RuntimeError(f"lxt did not patch {target.__name__}")


def hook_hidden_activation(module: Any, _: Any, output: Any) -> None:
    """As in the example: keep the output, and its gradient after the backward pass."""
    if isinstance(output, tuple):
        output = output[0]
    module.output = output
    if module.output.requires_grad:
        module.output.retain_grad()


def hook_input(module: Any, args: Any) -> None:
    """The same for a module's input."""
    module.seen = args[0]
    if module.seen.requires_grad:
        module.seen.retain_grad()


def relevance(tensor: torch.Tensor) -> torch.Tensor:
    """Gradient times input, float32, without the batch axis."""
    assert tensor.grad is not None
    return (tensor.float() * tensor.grad.float()).detach()[0]


def trace(model: Any, input_ids: torch.Tensor, inner: bool) -> dict[str, np.ndarray]:
    """One prompt, as in the example."""
    input_embeds = model.get_input_embeddings()(input_ids).detach()
    output_logits = model(inputs_embeds=input_embeds.requires_grad_(), use_cache=False).logits
    max_logits, max_indices = torch.max(output_logits[:, -1, :], dim=-1)
    max_logits.backward(torch.ones_like(max_logits))
    layers = model.model.layers
    arrays = {
        "resid": torch.stack([relevance(layer.output).sum(-1) for layer in layers]).numpy(),
        "embed": relevance(input_embeds).sum(-1).numpy(),
        "token_id": max_indices[0].numpy(),
        "logit": max_logits[0].detach().float().numpy(),
    }
    if inner:
        heads = model.config.num_attention_heads
        arrays["head"] = torch.stack(
            [
                relevance(layer.self_attn.o_proj.seen).unflatten(-1, (heads, -1)).sum((0, -1))
                for layer in layers
            ]
        ).numpy()
        arrays["neuron"] = torch.stack(
            [relevance(layer.mlp.down_proj.seen).sum(0) for layer in layers]
        ).numpy()
    return arrays


def trace_all(folder: Path, items: list[Any], dtype: torch.dtype, inner: bool) -> dict[str, Any]:
    """Every item, one after another, on one model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for layer in model.model.layers:
        layer.register_forward_hook(hook_hidden_activation)
        if inner:
            layer.self_attn.o_proj.register_forward_pre_hook(hook_input)
            layer.mlp.down_proj.register_forward_pre_hook(hook_input)
    arrays = {}
    for index, item in enumerate(items):
        if isinstance(item, str):
            input_ids = tokenizer(item, return_tensors="pt", add_special_tokens=True).input_ids
        else:
            input_ids = torch.tensor([item])
        for name, values in trace(model, input_ids, inner).items():
            arrays[f"{name}_{index}"] = values
    return arrays


def trace_models(
    rule: str, model_type: str, models: list[tuple[Path, Path]], arguments: argparse.Namespace
) -> None:
    """Every model of one rule and family, in a process whose classes nobody else needs."""
    patch(rule, model_type)
    items = json.loads(arguments.input.read_text())
    for folder, out in models:
        np.savez(out, **trace_all(folder, items, getattr(torch, arguments.dtype), arguments.inner))


def main() -> None:
    """Trace every prompt of the input file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, action="append", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rule", choices=("attnlrp", "cp_lrp"), action="append")
    parser.add_argument("--inner", action="store_true", help="also heads and neurons")
    arguments = parser.parse_args()

    rules = arguments.rule or ["attnlrp"]
    if len(rules) == 1:
        rules *= len(arguments.model)
    groups: dict[tuple[str, str], list[tuple[Path, Path]]] = {}
    for rule, folder, out in zip(rules, arguments.model, arguments.out, strict=True):
        model_type = AutoConfig.from_pretrained(folder).model_type
        groups.setdefault((rule, model_type), []).append((folder, out))
    if len(groups) == 1:
        for (rule, model_type), models in groups.items():
            trace_models(rule, model_type, models, arguments)
        return
    # Imported once, for all the processes.
    importlib.import_module("transformers.modeling_utils")
    fork = multiprocessing.get_context("fork")
    for (rule, model_type), models in groups.items():
        process = fork.Process(target=trace_models, args=(rule, model_type, models, arguments))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{rule} on {model_type} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
