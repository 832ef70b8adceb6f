"""The one place that imports lxt.

``lxt.efficient`` imports its model zoo, and the zoo of lxt 2.1 imports a BERT function that
transformers 5 no longer has and a vision model that needs torchvision. The patch functions need
neither, so the zoo has a stand-in while they are imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

INSTALL = "pip install --no-deps lxt==2.1"
_ZOO = "lxt.efficient.models"


def _no_default_map(module: ModuleType) -> dict[Any, Any]:
    raise ImportError(
        f"lxt's model zoo is not loaded in this process, so lxt has no default patches for "
        f"{module.__name__}; use reltrace_worker.lrp.apply_rule"
    )


def import_patches() -> ModuleType:
    """Import ``lxt.efficient.patches`` without lxt's model zoo.

    Returns
    -------
    ModuleType
        The module of patch functions. ``sys.modules`` keeps no stand-in.

    Raises
    ------
    ImportError
        lxt is not installed; names the command that installs it.
    """
    try:
        version("lxt")
    except PackageNotFoundError as error:
        raise ImportError(f"lxt is not installed; install it with: {INSTALL}") from error
    stand_in = None
    if "lxt.efficient" not in sys.modules:
        stand_in = ModuleType(_ZOO)
        stand_in.get_default_map = _no_default_map  # type: ignore[attr-defined]
        sys.modules[_ZOO] = stand_in
    try:
        with warnings.catch_warnings():
            # lxt warns that zennit is missing; zennit is for its vision models alone.
            warnings.simplefilter("ignore")
            return importlib.import_module("lxt.efficient.patches")
    finally:
        if stand_in is not None and sys.modules.get(_ZOO) is stand_in:
            del sys.modules[_ZOO]


_patches = import_patches()

Forward = Callable[..., Any]

rms_norm_forward: Forward = _patches.rms_norm_forward
gated_mlp_forward: Forward = _patches.gated_mlp_forward
cp_gated_mlp_forward: Forward = _patches.cp_gated_mlp_forward
wrap_attention_forward: Callable[[Forward], Forward] = _patches.wrap_attention_forward
cp_wrap_attention_forward: Callable[[Forward], Forward] = _patches.cp_wrap_attention_forward
