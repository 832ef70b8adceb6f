"""Nothing that reads or writes pickles: a pickle from elsewhere is a program from elsewhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "proto/reltrace_proto",
    "client/reltrace",
    "scheduler/reltrace_scheduler",
    "worker/reltrace_worker",
)
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle"),
    *("shelve", "marshal", "multiprocessing"),
}
# They unpickle, or may; safetensors is what the project reads and writes.
CALLS = {"torch.load", "torch.save", "torch.package"}
KEYWORDS = {"allow_pickle", "weights_only"}


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            names = [node.arg]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for name in names:
            if name.partition(".")[0] in MODULES or name in CALLS | KEYWORDS:
                yield f"line {getattr(node, 'lineno', '?')}: {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_uses_pickle(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): list(faults(file.read_text("utf-8"))) for file in files}
    assert not {file: places for file, places in found.items() if places}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from multiprocessing.connection import Client",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "importlib.import_module('pickle')",
        "def f():\n    import dill",
    ],
)
def test_it_would_be_noticed(source: str) -> None:
    assert list(faults(source))
