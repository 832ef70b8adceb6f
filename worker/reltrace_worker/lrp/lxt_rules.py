"""LXT's own functions as rules (``reltrace-worker --rules lxt``), taken from its maps.

``lxt.efficient`` imports its model zoo, and the zoo of lxt 2.1 imports a BERT function that
transformers 5 no longer has and a vision model that needs torchvision. The modules that are used
here need neither, so an empty package stands for the zoo while they are imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from reltrace_worker.lrp.rules import RULES, Forward, Rule
from reltrace_worker.models.families import FAMILIES, Family
from reltrace_worker.types.errors import ModelError

INSTALL = "pip install --no-deps lxt==2.1"
_ZOO = "lxt.efficient.models"

_MAPS = {"attnlrp": "attnLRP", "cp_lrp": "cp_LRP"}
# LXT has no maps for these: their classes compute as LLaMA's.
_SAME_AS = {"mistral": "llama", "smollm3": "llama"}


def import_lxt(name: str) -> ModuleType:
    """Import a module of ``lxt.efficient``, for example ``"patches"`` or ``"models.llama"``.

    Raises
    ------
    ModelError
        lxt is not installed; names the command that installs it.
    """
    spec = find_spec("lxt")
    if spec is None or spec.origin is None:
        raise ModelError(f"lxt is not installed; install it with: {INSTALL}")
    stand_in = None
    if _ZOO not in sys.modules:
        stand_in = ModuleType(_ZOO)
        stand_in.__path__ = [str(Path(spec.origin).parent / "efficient" / "models")]
        stand_in.get_default_map = None  # type: ignore[attr-defined]
        sys.modules[_ZOO] = stand_in
    try:
        with warnings.catch_warnings():
            # lxt warns that zennit is missing, which only its vision models use.
            warnings.simplefilter("ignore")
            return importlib.import_module(f"lxt.efficient.{name}")
    finally:
        if stand_in is not None:
            del sys.modules[_ZOO]


def lxt_rules(family: Family) -> dict[str, Rule]:
    """Return the rules for a family with LXT's functions; rules that LXT does not have stay ours.

    Raises
    ------
    ModelError
        lxt is not installed, or has no map for this family.
    """
    source = FAMILIES[_SAME_AS.get(family.model_type, family.model_type)]
    module = f"models.{source.model_type.removesuffix('_text')}"
    patches = import_lxt("patches")
    try:
        zoo = import_lxt(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"lxt has no rules for the architecture {family.model_type!r}; use --rules fused"
        ) from error
    wrappers = {
        patches.patch_attention: patches.wrap_attention_forward,
        patches.patch_cp_attention: patches.cp_wrap_attention_forward,
    }
    # Dropout, which LXT's maps name too, is inactive: models are in eval mode.
    classes = {source.norm: family.norm, source.gated_mlp: family.gated_mlp}
    rules = dict(RULES)
    for name, attribute in _MAPS.items():
        table: Mapping[Any, Any] = getattr(zoo, attribute)
        methods: dict[Any, tuple[str, Forward]] = {
            # An entry is `partial(patch_method, function, method_name="forward")`.
            classes[target]: (patch.keywords.get("method_name", "forward"), patch.args[0])
            for target, patch in table.items()
            if target in classes
        }
        (wrap,) = (wrappers[patch] for patch in table.values() if patch in wrappers)
        rules[name] = Rule(name, methods, wrap, mlp_tensors=3, functions="lxt")
    return rules
