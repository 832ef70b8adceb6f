"""Options that several commands share."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from reltrace.batch.items import InputFormat, InputName, count_items, read_items
from reltrace.cli.option_groups import argument, option, option_group
from reltrace.types.errors import invalid
from reltrace.types.request import Dtype

_ID_PREFIX = "id:"

MODEL = option(None, "Name of a served model.", show_default="the only one")
RULE = option("attnlrp", "Propagation rule.")
SPECIAL_TOKENS = option(
    True,
    "Put in front of a prompt what the tokenizer puts there (BOS), unless it has it.",
    "--add-special-tokens/--no-add-special-tokens",
)
CONTRAST = option(None, "Subtract the logit of this token (a text, or id:N).")
LOGPROB = option(False, "Log-probability of the target instead of its logit.", "--logprob")
TIMEOUT = option(None, "Time limit of the whole call, in seconds.")
LIMIT = option(None, "Only the first N prompts of the file.", min=1)
SEED = option(0, "Seed of random choices.", min=0)
COLUMN = option(
    None,
    "Column of the prompts, in CSV and Parquet; a column of conversations is called messages.",
    show_default="prompt, else messages",
)


@option_group
class TraceOptions:
    """What is traced, and which values are returned."""

    model: str | None = MODEL
    target: str = option(
        "max", 'What is explained: "max" (the largest logit), a token\'s text, or id:N.'
    )
    rule: str = RULE
    site: list[str] | None = option(
        None, "Where relevance is read; may be repeated.", show_default="resid"
    )
    reduce: str = option(
        "token",
        "What is summed: token leaves a value per token, feature one per feature, full "
        "everything; topk keeps the --top-k largest of each layer.",
    )
    top_k: int | None = option(None, "With --reduce topk: values per layer.")
    layer: list[int] | None = option(
        None, "A decoder layer to keep, from 0; may be repeated.", show_default="all"
    )
    dtype: Dtype = option("float32", "Number format in which relevance is sent.")
    add_special_tokens: bool = SPECIAL_TOKENS

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `Client.trace`, but for the target."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["target"]
        return found | {
            "sites": found.pop("site") or ["resid"],
            "layers": found.pop("layer") or None,
        }


@option_group
class PromptOptions:
    """One prompt or conversation, and how a model reads it."""

    prompt: str | None = argument(None, "A text; -: standard input.", show_default=False)
    chat: str | None = option(
        None,
        "Instead of PROMPT a conversation: JSON, a list of messages with role and "
        "content; -: standard input.",
        metavar="FILE|-",
        show_default=False,
    )

    def arguments(self, input_ids: str | None = None) -> dict[str, Any]:
        """Return the argument of `Client.trace` that holds the input, under its name."""
        if [self.prompt, self.chat, input_ids].count(None) != 2:
            raise typer.BadParameter(
                "give either a prompt or --chat; `reltrace trace` also takes --input-ids",
                param_hint="PROMPT",
            )
        if self.prompt is not None:
            return {"prompt": _standard_input() if self.prompt == "-" else self.prompt}
        if self.chat is not None:
            return {"messages": _messages(self.chat)}
        assert input_ids is not None
        parts = [part.strip() for part in input_ids.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise invalid("input-ids", f"must be token ids with commas between, not {input_ids!r}")
        return {"input_ids": [int(part) for part in parts]}


@option_group
class FileOptions:
    """How a file of prompts is read."""

    input_format: InputName | None = option(
        None, "Format of the prompts.", show_default="by the ending; of standard input: jsonl"
    )
    column: str | None = COLUMN
    id_column: str | None = option(
        None, "Column of the ids of prompts.", show_default="id, if there is one"
    )

    def format_of(self, path: Path | None, *further: str) -> InputFormat:
        """Return how to read a file, or standard input; `further` columns as well."""
        return InputFormat.of(path, self.input_format, self.column, self.id_column, further)


def file_of(source: str, field: str = "input") -> Path | None:
    """Return the file of prompts that an argument names; None: standard input."""
    path = Path(source)
    if source == "-":
        return None
    if path.is_dir() or not path.exists():
        raise invalid(field, f"there is no file {source!r}")
    return path


class PromptFile:
    """The prompts of a file, or of standard input (None), as arguments of `Client.trace`.

    Errors name the field and the line. `check` takes the arguments of a prompt and this name.
    """

    def __init__(
        self,
        path: Path | None,
        input_format: InputFormat,
        field: str = "input",
        check: Callable[[Any, str], object] = lambda arguments, name: None,
    ) -> None:
        self._path, self._format, self._field, self._check = path, input_format, field, check

    def __len__(self) -> int:
        assert self._path is not None
        with self._path.open("rb") as file:
            return count_items(file, self._format)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with nullcontext(sys.stdin.buffer) if self._path is None else self._path.open("rb") as file:
            for item in read_items(file, self._format):
                name = f"{self._field}, line {item.line}"
                if item.fault is not None:
                    raise invalid(name, str(item.fault))
                self._check(item.arguments, name)
                yield {"id": item.id, **item.arguments}


def target_of(text: str, field: str = "target") -> str | int:
    """Return the `target` argument that an option stands for."""
    if not text.startswith(_ID_PREFIX):
        return text
    number = text.removeprefix(_ID_PREFIX)
    if not (number.isascii() and number.isdigit()):
        raise invalid(field, f"after {_ID_PREFIX} comes a token id, not {number!r}")
    return int(number)


def _standard_input() -> str:
    """Read a text in the encoding of standard input; ASCII is taken as UTF-8, which has it."""
    encoding = sys.stdin.encoding
    if codecs.lookup(encoding).name in ("ascii", "utf-8"):
        encoding = "utf-8-sig"
    data = sys.stdin.buffer.read()
    try:
        return data.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise invalid("prompt", f"standard input is not {name} at byte {error.start}") from None


def _messages(chat: str) -> Any:
    """Read the messages of a conversation: a list, or an object that has them."""
    name = "standard input" if chat == "-" else chat
    try:
        data = sys.stdin.buffer.read() if chat == "-" else Path(chat).read_bytes()
        value = json.loads(data)
    except OSError as error:
        raise invalid("chat", f"{name} can not be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise invalid("chat", f"{name} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise invalid(
            "chat", f"{name} must be a JSON list of messages, or an object with it as messages"
        )
    return value
