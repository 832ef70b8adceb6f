from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reltrace
from fake_server import FakeServer
from reltrace.batch.folder import Settings
from reltrace.batch.items import InputFormat
from reltrace.batch.preflight import check_served
from reltrace.batch.run import Options, Run, Summary
from reltrace.calls.progress import Progress

SETTINGS = Settings(
    model=None, sites=["resid"], reduce="token", target="max", rule="attnlrp", dtype="float32",
    layers=None, top_k=None, format="safetensors", input_format="text", column=None,
    id_column=None, shards=1,
)  # fmt: skip


class Seen(Progress):
    """Records the progress of a run."""

    def __init__(self) -> None:
        super().__init__([], shown=False)
        self.done = 0
        self.results: list[bool] = []

    def begin(self, done: int) -> None:
        self.done = done

    def add(self, count: int, failed: int = 0) -> None:
        self.results += [bool(failed)] * count


@pytest.fixture
def batch(server: FakeServer, tmp_path: Path) -> Callable[..., Summary]:
    """Run a batch of lines of text; keyword arguments are settings or options."""

    def run(
        lines: Sequence[str] | bytes,
        out: str = "out",
        progress: Seen | None = None,
        *,
        checked: bool = True,
        **given: Any,
    ) -> Summary:
        names = Settings.__dataclass_fields__
        settings = replace(SETTINGS, **{k: v for k, v in given.items() if k in names})
        rest = {k: v for k, v in given.items() if k not in names}
        source, stdin = None, io.BytesIO(lines if isinstance(lines, bytes) else b"")
        if not isinstance(lines, bytes):
            source = tmp_path / f"in.{settings.input_format}"
            source.write_text("".join(line + "\n" for line in lines))
        options = Options(source, tmp_path / out, **rest)
        settings = replace(settings, shards=options.shard[1])
        reading = InputFormat(settings.input_format)
        with reltrace.Client(server.address) as client:
            if checked:
                check_served(settings, client.models())
            run = Run(client, settings, reading, options, stdin, progress or Seen())
            return run.run()

    return run
