"""Whether a server can do what a batch asks for, before a million prompts fail one by one."""

from __future__ import annotations

from collections.abc import Sequence

from reltrace.batch.folder import Settings
from reltrace.calls.pinning import named
from reltrace.types.errors import ModelNotFound, invalid
from reltrace.types.server_info import Model


def check_served(settings: Settings, models: Sequence[Model]) -> None:
    """Check what all prompts share against what is served.

    Parameters
    ----------
    settings : Settings
        Those of the batch.
    models : sequence of Model
        What is served; none: workers have yet to come, and the prompts wait for them.

    Raises
    ------
    ModelNotFound, InvalidArgument
        Naming what is served.
    """
    if not models:
        return
    found = named(models, settings.model or "")
    names = ", ".join(dict.fromkeys(model.name for model in found or models))
    if not found:
        raise ModelNotFound(f"model: {settings.model!r} is not served; served: {names}")
    if len({model.name for model in found}) > 1:
        raise invalid("model", f"is missing, and several are served: {names}")
    model = found[0]
    asked = [
        ("rule", [settings.rule], model.rules),
        ("reduce", [settings.reduce], model.reductions),
        ("site", settings.sites, model.sites),
    ]
    for field, values, served in asked:
        for value in values:
            if value not in served:
                raise invalid(
                    field, f"{value!r} is not served; {model.name} has {', '.join(served)}"
                )
    for layer in settings.layers or ():
        if not 0 <= layer < model.layers:
            raise invalid("layer", f"{layer} is not one of the {model.layers} of {model.name}")
