"""LXT's documented example on a model in memory, and the best that a user could make of it.

The other sides of the benchmarks. `trace` is the example, checkpointed as its page says;
`trace_padded` is what a user with an hour would write with the same rules: no checkpointing,
prompts of about equal lengths in one padded batch, logits at the last position only.
 As in ``reference/lxt_example.py``, lxt patches the classes of
the llama module, and forward hooks with ``retain_grad`` keep what the decoder layers put out; here
for as long as a block lasts, so that both sides can take turns in one process. As on the page the
model is in train mode with gradient checkpointing; the backward starts at 1, which costs the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from reltrace_worker.lrp.lxt_rules import import_lxt
from transformers.models.llama import modeling_llama

lxt = import_lxt("patches")


def _keep(module: Any, _: Any, output: Any) -> None:
    module.output = output[0] if isinstance(output, tuple) else output
    if module.output.requires_grad:
        module.output.retain_grad()


@contextmanager
def patched(model: Any, *, checkpointing: bool = True) -> Iterator[None]:
    """Patch the classes, as ``monkey_patch(modeling_llama)`` does, and take it back."""
    mlp, norm = modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm
    before = (
        mlp.forward,
        norm.forward,
        modeling_llama.eager_attention_forward,
        modeling_llama.ALL_ATTENTION_FUNCTIONS,
    )
    registry = type(before[3])()
    for key, function in before[3].items():
        registry[key] = lxt.wrap_attention_forward(function)
    handles = [layer.register_forward_hook(_keep) for layer in model.model.layers]
    try:
        mlp.forward = lxt.gated_mlp_forward
        norm.forward = lxt.rms_norm_forward
        modeling_llama.eager_attention_forward = lxt.wrap_attention_forward(before[2])
        modeling_llama.ALL_ATTENTION_FUNCTIONS = registry
        if checkpointing:
            model.train()
            with warnings.catch_warnings():
                # transformers 5 renames what the page calls.
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable()
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_disable()
        model.eval()
        for handle in handles:
            handle.remove()
        for layer in model.model.layers:
            vars(layer).pop("output", None)
        (
            mlp.forward,
            norm.forward,
            modeling_llama.eager_attention_forward,
            modeling_llama.ALL_ATTENTION_FUNCTIONS,
        ) = before


def trace(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Trace one prompt: relevance of the residual stream, float32 [layers, tokens], on the CPU."""
    input_ids = torch.tensor([token_ids], device=model.device)
    embeddings = model.get_input_embeddings()(input_ids).detach()
    logits = model(inputs_embeds=embeddings.requires_grad_(), use_cache=False).logits
    largest = logits[:, -1, :].max(-1).values
    largest.backward(torch.ones_like(largest))
    rows = [
        (layer.output * layer.output.grad).float().sum(-1).detach().cpu()
        for layer in model.model.layers
    ]
    return torch.cat(rows)


def trace_padded(model: Any, prompts: list[list[int]], together: int) -> list[torch.Tensor]:
    """Trace prompts, so many in a batch, sorted by length and padded on the left."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    traces: dict[int, torch.Tensor] = {}
    for at in range(0, len(order), together):
        some = order[at : at + together]
        longest = len(prompts[some[-1]])
        pads = [longest - len(prompts[index]) for index in some]
        input_ids = torch.tensor(
            [[0] * pad + prompts[index] for pad, index in zip(pads, some, strict=True)],
            device=model.device,
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        mask = mask.to(model.device)
        embeddings = model.get_input_embeddings()(input_ids).detach()
        logits = model(
            inputs_embeds=embeddings.requires_grad_(),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        ).logits
        logits[:, -1, :].max(-1).values.sum().backward()
        layers = [
            (layer.output * layer.output.grad).float().sum(-1).detach().cpu()
            for layer in model.model.layers
        ]
        for row, (index, pad) in enumerate(zip(some, pads, strict=True)):
            traces[index] = torch.stack([layer[row, pad:] for layer in layers])
    return [traces[index] for index in range(len(prompts))]
