"""LXT's documented example ("Latent Feature Attribution"), run prompt by prompt.

The other side of parity tests: it imports nothing of reltrace. It follows
https://lxt.readthedocs.io (Latent Feature Attribution): lxt patches the classes of one
modeling module, forward hooks with ``retain_grad`` save what the decoder layers put out,
one prompt after another. The patches are lxt's own maps, those of its ``models/llama.py``,
``qwen2.py``, ``qwen3.py`` and ``gemma3.py``; lxt has none for Mistral and SmolLM3, whose classes
compute as LLaMA's do and get LLaMA's. Five things differ from the page:

- the backward pass starts at 1, not at the logit (which only multiplies every number by it);
- every site is kept by a hook, not the outputs of the decoder layers alone;
- no checkpointing (it changes memory, not numbers);
- lxt 2.1's model zoo does not import as a whole beside transformers 5, so that of its modules
  only the one of the family is imported;
- lxt's ``patch_attention`` replaces transformers' attention registry by a plain dict, which
  transformers 5 calls methods on, so the wrapped functions are put into a registry instead.

Run: ``python lxt_example.py --model MODEL --input IN.json --out OUT.npz``, where MODEL is a folder
or a GGUF file, which transformers reads. ``--model`` and ``--out`` can be given several times, in
the same order, for several models, and so can ``--rule``; the rule "gradient" patches nothing. A
patch can not be undone: each rule gets a process of its own, forked before it.
IN.json is a list; an item is a prompt or a list of token ids. For item i, OUT.npz holds
``SITE_i`` for every site, [layers, tokens, features] (``embed_i`` [tokens, features]),
``head_terms_i``, ``token_id_i`` and ``logit_i``: see ``gradient.py``.
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

if __name__ == "__main__":
    # A script has its own folder in the path, and this one has modules that are named as packages.
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import torch
from reference.gradient import gradient_times_input
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    "smollm3": ("smollm3", "llama"),
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
        names = {"mistral": "Mistral", "smollm3": "SmolLM3"}
        mirror = target.__name__.replace("Llama", names.get(ours, "Llama"))
        if not apply(getattr(modeling, mirror, target)):
            raise RuntimeError(f"lxt did not patch {target.__name__}")


def load(source: Path, dtype: torch.dtype) -> Any:
    """Load a folder, or a GGUF file as transformers dequantizes it."""
    gguf = source.suffix == ".gguf"
    where, options = (source.parent, {"gguf_file": source.name}) if gguf else (source, {})
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, use_safetensors=None if gguf else True, **options
    )
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model.eval()


def token_ids(source: Path, items: list[Any]) -> list[list[int]]:
    """Encode the items that are text."""
    if not any(isinstance(item, str) for item in items):
        return items
    tokenizer = AutoTokenizer.from_pretrained(source)
    return [tokenizer(item).input_ids if isinstance(item, str) else item for item in items]


def trace_all(rule: str, model: Any, prompts: list[list[int]], out: Path) -> None:
    """Every prompt, one after another, in a process whose classes nobody else needs."""
    if rule != "gradient":
        patch(rule, model.config.model_type)
    arrays = {}
    for index, ids in enumerate(prompts):
        found = gradient_times_input(model, ids)
        arrays |= {f"{site}_{index}": values.numpy() for site, values in found.values.items()}
        arrays[f"head_terms_{index}"] = found.terms["head"].numpy()
        arrays[f"token_id_{index}"] = np.array(found.token_id)
        arrays[f"logit_{index}"] = np.array(found.logit)
    np.savez(out, **arrays)


def main() -> None:
    """Trace every prompt of the input file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, action="append", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rule", choices=("attnlrp", "cp_lrp", "gradient"), action="append")
    arguments = parser.parse_args()

    rules = arguments.rule or ["attnlrp"]
    if len(rules) == 1:
        rules *= len(arguments.model)
    by_model: dict[Path, list[tuple[str, Path]]] = {}
    for rule, source, out in zip(rules, arguments.model, arguments.out, strict=True):
        by_model.setdefault(source, []).append((rule, out))
    items = json.loads(arguments.input.read_text())
    # A pool of threads does not survive a fork.
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for source, wanted in by_model.items():
        # Reading a GGUF file takes long: once for all rules. A patch reaches the loaded model, too,
        # for it replaces what the classes have.
        model = load(source, getattr(torch, arguments.dtype))
        prompts = token_ids(source, items)
        for rule, out in wanted:
            process = fork.Process(target=trace_all, args=(rule, model, prompts, out))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"{rule} on {source} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
