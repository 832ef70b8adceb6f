"""The small trained LLaMA that ships with the worker, and how it is made.

``path()`` is the model's folder; its ``README.md`` is the model card. ``python -m
demo_model.train`` makes the folder anew.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

DEMO_MODEL = "reltrace-demo"
"""Name under which the demo model is served."""


def path() -> Path:
    """Give the folder with the demo model's config, weights, tokenizer and model card.

    Raises
    ------
    FileNotFoundError
        The package was installed without the weights.
    """
    # The worker is always installed as plain files: torch could not map weights out of an archive.
    folder = Path(str(resources.files("reltrace_worker.demo"))) / "weights"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; `python -m demo_model.train` makes it"
        )
    return folder
