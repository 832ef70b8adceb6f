"""Batches read back."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import reltrace
from reltrace.batch.run import Summary

Batch = Callable[..., Summary]

LINES = [f"prompt {number}" for number in range(30)]


def test_traces_by_their_place(batch: Batch, tmp_path: Path) -> None:
    batch(LINES, part_traces=4)
    loaded = reltrace.load_batch(tmp_path / "out")
    assert len(loaded) == 30
    assert loaded[0].id == 0
    assert loaded[-1].id == 29
    for wrong in (30, -31):
        with pytest.raises(IndexError, match="has 30 traces"):
            loaded[wrong]
    assert [trace.id for trace in loaded] == list(range(30))
    # No file stays open for every part that was read.
    assert loaded._part.cache_info().currsize <= 8
    assert repr(loaded) == "Batch(30 traces in 8 files, 0 errors)"


def test_a_folder_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="holds no batch"):
        reltrace.load_batch(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(reltrace.InvalidArgument, match="of format 'other'"):
        reltrace.load_batch(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(reltrace.InvalidArgument, match=r"is damaged: it is not a JSON object"):
        reltrace.load_batch(tmp_path)
    with pytest.raises(reltrace.InvalidArgument, match=r"holds no batch"):
        reltrace.load_batch(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(reltrace.InvalidArgument, match="is damaged"):
        reltrace.load_batch(tmp_path)


def test_a_part_that_is_damaged(batch: Batch, tmp_path: Path) -> None:
    for part_format in ("safetensors", "parquet"):
        batch(LINES, out=part_format, format=part_format)
        (tmp_path / part_format / f"part-000000.{part_format}").write_bytes(b"nonsense")
        with pytest.raises(reltrace.InvalidArgument, match="is no part of a batch"):
            reltrace.load_batch(tmp_path / part_format)[0]


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("reduce", ["token", "full"])
def test_numbers_are_those_of_trace(
    batch: Batch, client: reltrace.Client, tmp_path: Path, part_format: str, reduce: str
) -> None:
    # The fake server announces one reduction, and does several.
    batch(LINES, checked=False, format=part_format, reduce=reduce, sites=["embed", "resid"])
    for line, loaded in zip(LINES, reltrace.load_batch(tmp_path / "out"), strict=True):
        trace = client.trace(line, sites=["embed", "resid"], reduce=reduce)
        assert loaded.sites == ("embed", "resid")
        for site in trace.sites:
            np.testing.assert_array_equal(loaded[site], trace[site])
            assert loaded[site].dtype == trace[site].dtype
        assert loaded.tokens == trace.tokens
        assert loaded.target == trace.target
        assert loaded.provenance == trace.provenance


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_conversations_and_what_was_read_of_them(
    batch: Batch, client: reltrace.Client, tmp_path: Path, part_format: str
) -> None:
    messages = [{"role": "user", "content": "Cats or dogs?"}]
    line = {"custom_id": "r-1", "body": {"messages": messages}}
    wrong = {"messages": [{"role": "user"}], "id": "w"}
    summary = batch(
        [json.dumps(line), json.dumps("a b"), json.dumps(wrong)],
        format=part_format, input_format="jsonl", add_special_tokens=False,
    )  # fmt: skip
    assert (summary.traced, summary.failed) == (2, 1)
    chat, plain = loaded = reltrace.load_batch(tmp_path / "out")
    asked = client.trace(messages=messages)
    assert chat.id == "r-1"
    np.testing.assert_array_equal(chat.offsets, asked.offsets)
    for name in ("text", "tokens", "turns", "hints", "special_positions", "target"):
        assert getattr(chat, name) == getattr(asked, name), name
    assert (plain.tokens, plain.text) == (["a", "b"], "a b")
    (failed,) = loaded.errors
    assert (failed.id, failed.line) == ("w", 3)
    assert "messages[0].content: is missing" in failed.message
    with pytest.raises(reltrace.InvalidArgument, match="add_special_tokens was False"):
        batch([json.dumps("a b")], format=part_format, input_format="jsonl")


def test_into_datasets(batch: Batch, tmp_path: Path) -> None:
    batch(LINES, part_traces=7)
    loaded = reltrace.load_batch(tmp_path / "out")
    dataset = datasets.Dataset.from_generator(loaded.rows, cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 30
    np.testing.assert_array_equal(np.float32(dataset[3]["resid"]), loaded[3].relevance)
    assert dataset[3]["tokens"] == loaded[3].tokens


def test_parquet_is_read_by_others(batch: Batch, tmp_path: Path) -> None:
    batch(LINES, format="parquet", part_traces=7)
    loaded = reltrace.load_batch(tmp_path / "out")
    files = sorted(map(str, (tmp_path / "out").glob("part-*.parquet")))
    dataset = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    frame = pd.concat(map(pd.read_parquet, files)).sort_values("index")
    assert len(dataset) == len(frame) == 30
    row = frame.iloc[3]
    resid = row["resid"].reshape(row["resid.shape"])
    np.testing.assert_array_equal(resid, loaded[3].relevance)
    assert list(row["tokens"]) == loaded[3].tokens
    assert row["id"] == "3"


def test_a_batch_travels_between_processes(batch: Batch, tmp_path: Path) -> None:
    batch(LINES)
    loaded = reltrace.load_batch(tmp_path / "out")
    first = loaded[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(loaded))[0].relevance, first.relevance)
