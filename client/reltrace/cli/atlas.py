"""`reltrace atlas`: where in a corpus every neuron and head is strongest."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import typer
from rich.text import Text

import reltrace
from reltrace.atlas.examples import QUANTILES
from reltrace.atlas.imported_labels import BUILT_IN
from reltrace.atlas.slices import read_prompt
from reltrace.batch.items import InputFormat, format_of
from reltrace.cli.connection import Connection, connection_group
from reltrace.cli.option_groups import argument, command, option
from reltrace.cli.options import (
    COLUMN,
    MODEL,
    RULE,
    SEED,
    SPECIAL_TOKENS,
    PromptFile,
    file_of,
    target_of,
)
from reltrace.cli.output import AS_JSON, QUIET, print_found, print_json, safe, write
from reltrace.types.atlas_shard import LISTS, MEASURES
from reltrace.types.token_text import visible_token

app = connection_group("Where in a corpus neurons and heads are strongest.")
labels = typer.Typer(no_args_is_help=True, help="Export the labels of an atlas, and import others.")
app.add_typer(labels, name="labels")

FOLDER = argument(..., "Folder of the atlas.", metavar="FOLDER")
SiteName: TypeAlias = Literal["neuron", "head"]
MeasureName: TypeAlias = Literal["relevance", "activation"]
SITE = option("neuron", "Neurons or attention heads.")
MEASURE = option("relevance", "Measure by which contexts are ranked.")


@command(app)
def build(
    connection: Connection,
    corpus: str = argument(
        ...,
        "File of prompts or conversations, by its ending: jsonl, csv, parquet (and "
        ".gz); any other, and standard input (-), has a prompt per line.",
        metavar="CORPUS",
    ),
    out: Path = argument(..., "Folder; an atlas that exists there is continued.", metavar="OUT"),
    model: str | None = MODEL,
    rule: str = RULE,
    target: str | None = option(
        None,
        'What is explained at the end of each prompt: "max", a token\'s text, or id:N.',
        show_default="its own next tokens, at all positions",
    ),
    positions: int | None = option(
        None, "Explain N random positions of each prompt instead of all."
    ),
    seed: int = SEED,
    keep_special: bool = option(
        False, "Also count the first token and special tokens.", "--keep-special"
    ),
    add_special_tokens: bool = SPECIAL_TOKENS,
    k: int = option(16, "Contexts to keep in each list.", "--places"),
    slice_: int = option(1024, "Largest number of prompts in one job.", "--slice"),
    column: str | None = COLUMN,
    quiet: bool = QUIET,
    as_json: bool = AS_JSON,
) -> None:
    """Build an atlas, or complete one that was interrupted."""
    path = file_of(corpus, "corpus")
    name = "text" if path is None else format_of(path) or "text"
    input_format = InputFormat.of(path, name, column, None)
    # Checked here, because only the file knows the line that an error must name.
    prompts = PromptFile(path, input_format, "corpus", read_prompt)
    with connection.client() as client:
        found = client.build_atlas(
            # Standard input has no length, so that progress has no total.
            iter(prompts) if path is None else prompts,
            out,
            model=model,
            rule=rule,
            target=None if target is None else target_of(target),
            positions=positions,
            seed=seed,
            keep_special=keep_special,
            add_special_tokens=add_special_tokens,
            k=k,
            slice=slice_,
            progress=not quiet,
        )
    if as_json:
        print_json({**found.about, "tokens": found.tokens, "skipped": found.skipped})
    else:
        left_out = f", {len(found.skipped)} prompts left out" if found.skipped else ""
        typer.echo(f"{out}: {found.tokens} tokens{left_out}")


@command(app)
def show(
    folder: Path = FOLDER,
    layer: int = argument(..., "Decoder layer, from 0."),
    index: int = argument(..., "Neuron, or head, from 0.", metavar="NEURON"),
    site: SiteName = SITE,
    measure: MeasureName = MEASURE,
    as_json: bool = AS_JSON,
) -> None:
    """Show the contexts in which a neuron or head is strongest."""
    atlas = reltrace.load_atlas(folder)
    found = atlas.neuron(layer, index) if site == "neuron" else atlas.head(layer, index)
    names = [name for name in LISTS if name.startswith(measure)]
    summary = {
        "label": found.label,
        "labelled_by": found.labelled_by,
        "mass": found.mass,
        "count": found.count,
        "mean": {of: _known(found.mean[of]) for of in MEASURES},
        "quantiles": {
            of: {f"{share:g}": _known(found.quantile(share, of)) for share in QUANTILES}
            for of in MEASURES
        },
        **{name: found.contexts[name] for name in names},
    }
    if not as_json:
        quantiles = ", ".join(f"{found.quantile(share, measure):.3g}" for share in QUANTILES)
        by = f" (by {found.labelled_by})" if found.labelled_by not in ("", BUILT_IN) else ""
        write(
            f"{site} {index} of layer {layer}: {found.label or '-'}{by}\n"
            f"{found.count} tokens, relevance mass {found.mass:.4g}\n"
            f"{measure}: mean {found.mean[measure]:.3g}; 1 %, 50 %, 99 % below {quantiles}"
        )
    rows = [
        (f"{one.value(measure):+.4g}", _line(one, measure), visible_token(one.target).strip())
        for name in names
        for one in found.contexts[name]
    ]
    columns = (measure, "where", "next" if atlas.about["target"] is None else "explained")
    print_found(summary, as_json, columns, rows, (measure,))


@command(app)
def find(
    folder: Path = FOLDER,
    text: str = argument(..., "Text to find in contexts and in imported labels."),
    site: SiteName = SITE,
    measure: MeasureName = MEASURE,
    k: int = option(20, "Show at most N.", "-k", "--most"),
    as_json: bool = AS_JSON,
) -> None:
    """List the neurons or heads whose contexts have a text."""
    found = reltrace.load_atlas(folder).find(text, site=site, measure=measure, k=k)
    rows = [
        (one.layer, one.index, f"{one.count} of {one.of}", one.label or "-",
         _line(one.strongest, measure) if one.strongest else "-")
        for one in found
    ]  # fmt: skip
    columns = ("layer", site, "contexts", "label", f"strongest of them, by {measure}")
    nothing = f"No {site} has it in its contexts."
    print_found(found, as_json, columns, rows, columns[:3], empty=nothing)


@command(app)
def page(
    folder: Path = FOLDER,
    out: Path = argument(..., "Ends in .html.", metavar="OUT"),
    most: int = option(2000, "Neurons on the page: those with most relevance mass."),
    contexts: int = option(8, "Contexts shown of each list; the search covers all of them."),
) -> None:
    """Write a page for browsing the atlas, in one file."""
    typer.echo(reltrace.load_atlas(folder).save_page(out, most=most, contexts=contexts))


@command(labels, "export")
def export_labels(
    folder: Path = FOLDER,
    out: Path = argument(..., "File to write, as JSON lines.", metavar="OUT"),
    site: SiteName = SITE,
    most: int | None = option(None, "Export only the N with most relevance mass."),
) -> None:
    """Write labels with their contexts, for a person or a language model to improve."""
    count = reltrace.load_atlas(folder).export_labels(out, site=site, most=most)
    typer.echo(f"{out}: {count} labels")


@command(labels, "import")
def import_labels(
    folder: Path = FOLDER,
    source: Path = argument(..., "File of JSON lines with layer, index and label.", metavar="FILE"),
) -> None:
    """Import the labels of a file, all or none; an empty label removes one."""
    count = reltrace.load_atlas(folder).import_labels(source)
    typer.echo(f"{folder}: {count} labels changed")


def _known(value: float) -> float | None:
    """Return a number; None for NaN, which JSON does not have."""
    return value if value == value else None


def _line(place: reltrace.Context, measure: str) -> Text:
    """Return the tokens of a context, the strong one marked and in colour."""
    before, token, after = map(safe, place.parts())
    strong = "bold red" if place.value(measure) > 0 else "bold blue"
    return Text.assemble(before, (f"⟦{token}⟧", strong), after)
