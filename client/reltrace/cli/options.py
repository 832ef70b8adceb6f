"""Options that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from reltrace_proto.net import TlsOptions

import reltrace
from reltrace.batch.items import InputName
from reltrace.transport.settings import ADDRESS_VARIABLE, DEFAULT_ADDRESS
from reltrace.types.errors import invalid
from reltrace.types.request import Dtype as DtypeName

_ID_PREFIX = "id:"

Server = Annotated[
    str | None,
    typer.Option(
        envvar=ADDRESS_VARIABLE,
        help="HOST:PORT of the server, several with commas between, or dns:///NAME:PORT."
        f" (default: {DEFAULT_ADDRESS})",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(help="A text; -: standard input.", show_default=False),
]
Chat = Annotated[
    str | None,
    typer.Option(
        envvar="RELTRACE_CHAT",
        metavar="FILE|-",
        help="Instead of PROMPT a conversation: JSON, a list of messages with role and content; "
        "-: standard input.",
        show_default=False,
    ),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens/--no-add-special-tokens",
        envvar="RELTRACE_ADD_SPECIAL_TOKENS",
        help="Put in front of a prompt what the tokenizer puts there (BOS), unless it has it.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(envvar="RELTRACE_MODEL", help="Name of a served model; default: the only one."),
]
TargetText = Annotated[
    str,
    typer.Option(
        envvar="RELTRACE_TARGET",
        help='What is explained: "max" (the largest logit), a token\'s text, or id:N.',
    ),
]
Rule = Annotated[str, typer.Option(envvar="RELTRACE_RULE", help="Propagation rule.")]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--site",
        envvar="RELTRACE_SITE",
        help="Where relevance is read; may be repeated. (default: resid)",
        show_default=False,
    ),
]
Reduce = Annotated[
    str,
    typer.Option(
        envvar="RELTRACE_REDUCE",
        help="What is summed: token leaves a value per token, feature one per feature, full "
        "everything; topk keeps the --top-k largest of each layer.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(envvar="RELTRACE_TOP_K", help="With --reduce topk: values per layer."),
]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        "--layer",
        envvar="RELTRACE_LAYER",
        help="A decoder layer to keep, from 0; may be repeated. (default: all)",
        show_default=False,
    ),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(envvar="RELTRACE_RESULT_DTYPE", help="Number format in which relevance travels."),
]
PromptFormat = Annotated[
    InputName | None,
    typer.Option(
        envvar="RELTRACE_INPUT_FORMAT",
        help="Of the prompts. (default: by the ending; of standard input: jsonl)",
        show_default=False,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        envvar="RELTRACE_COLUMN",
        help="Column of the prompts, in CSV and Parquet; that of conversations is called messages. "
        "(default: prompt, else messages)",
        show_default=False,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        envvar="RELTRACE_ID_COLUMN",
        help="Column of their ids. (default: id, if there is one)",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(envvar="RELTRACE_LIMIT", min=1, help="Only the first N prompts of the file."),
]
Quiet = Annotated[bool, typer.Option("--quiet", envvar="RELTRACE_QUIET", help="Show no progress.")]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="RELTRACE_JSON", help="Print JSON for machines.")
]


@dataclass(frozen=True, slots=True)
class Access:
    """What the options before the command say."""

    token_file: Path | None
    tls: TlsOptions | bool | None
    insecure: bool | None

    def client(self, server: str | None, retry_timeout: float = 30.0) -> reltrace.Client:
        """Return a client; it waits so many seconds for a server that is away."""
        # An option wins over the environment, where the client looks for what is None.
        return reltrace.Client(
            server,
            token=self.token_file,
            tls=self.tls,
            insecure=self.insecure,
            retry_timeout=retry_timeout,
        )


def access_of(context: typer.Context) -> Access:
    """Return what the options before the command say."""
    access = context.find_object(Access)
    assert access is not None
    return access


def target_of(text: str, field: str = "target") -> str | int:
    """Return the `target` argument that an option stands for.

    Raises
    ------
    InvalidArgument
        If it is an id that is none.
    """
    if not text.startswith(_ID_PREFIX):
        return text
    number = text.removeprefix(_ID_PREFIX)
    if not (number.isascii() and number.isdigit()):
        raise invalid(field, f"after {_ID_PREFIX} comes a token id, not {number!r}")
    return int(number)


def input_of(prompt: str | None, chat: str | None, ids: str | None = None) -> dict[str, Any]:
    """Return the argument of `trace` for what is put before the model, under its name.

    Raises
    ------
    InvalidArgument
        If the conversation can not be read, or the ids are none.
    typer.BadParameter
        If not exactly one of the three is given.
    """
    given = [one for one in (prompt, chat, ids) if one is not None]
    if len(given) != 1:
        raise typer.BadParameter(
            "give one of a prompt, --chat and --input-ids", param_hint="PROMPT"
        )
    if prompt is not None:
        return {"prompt": sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt}
    if chat is not None:
        return {"messages": _messages(chat)}
    assert ids is not None
    parts = [part.strip() for part in ids.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise invalid("input-ids", f"must be token ids with commas between, not {ids!r}")
    return {"input_ids": [int(part) for part in parts]}


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


def echo_hints(hints: Sequence[str]) -> None:
    """Print what a reader should know of how a prompt was read, to standard error."""
    for hint in hints:
        typer.echo(f"reltrace: {hint}", err=True)


def echo_json(value: Any) -> None:
    """Print a value as one line of JSON; times in ISO 8601."""
    typer.echo(json.dumps(value, default=_plain))


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
