"""Checks of what a batch, and each of its prompts, asks for, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reltrace.batch.folder import Settings
from reltrace.calls.pinning import named
from reltrace.types.errors import InvalidArgument, ModelNotFound, invalid
from reltrace.types.server_info import Model


def check_served(settings: Settings, models: Sequence[Model]) -> None:
    """Check what all prompts share against the models that are served.

    Without any model workers have yet to come: nothing is checked, and the prompts will wait.

    Raises ModelNotFound or InvalidArgument, naming what is served.
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


def find_fault(arguments: Mapping[str, Any], settings: Settings) -> InvalidArgument | None:
    """Return why a batch can not hold the traces of a prompt that has arguments of its own.

    Their values are not checked otherwise. Whether a prompt's own model is that of a batch that
    names none is only known from the trace.
    """
    required: dict[str, Any] = {"rule": settings.rule, "reduce": settings.reduce}
    if settings.model is not None:
        required["model"] = settings.model
    if settings.format == "parquet":
        # It has a column per site, of one type, and as long as all others.
        required |= {"dtype": settings.dtype, "output_uri": settings.output_uri}
        sites = arguments.get("sites", settings.sites)
        sites = [sites] if isinstance(sites, str) else sites
        # Their order may differ; repeated names are refused elsewhere.
        names = isinstance(sites, list) and all(isinstance(site, str) for site in sites)
        if not names or set(sites) != set(settings.sites):
            required["sites"] = settings.sites
    for name, value in required.items():
        if name in arguments and arguments[name] != value:
            held = f"{name} {value!r}" if value is not None else f"no {name}"
            return invalid(
                name,
                f"is {arguments[name]!r} for this prompt, and the folder holds traces with {held} "
                "only; leave it out, or trace the prompt into another folder",
            )
    return None
