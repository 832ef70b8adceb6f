"""The arguments of `trace`, checked before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import reltrace
from hypothesis import given
from hypothesis import strategies as st
from reltrace.types.prompt import MAX_JOB_BYTES
from reltrace.types.request import Arguments, JobMaker

USER = {"role": "user", "content": "hello"}
PART = {"type": "text", "text": "hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: is missing; give prompt, messages or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "prompt: excludes input_ids"),
        ({"prompt": ""}, "prompt: must not be empty"),
        ({"prompt": b"bytes"}, "prompt: must be str, not bytes"),
        ({"prompt": "a\udfffb"}, "prompt: character 1 is a lone surrogate"),
        ({"prompt": "x" * (MAX_JOB_BYTES + 1)}, "prompt: makes a job of .* bytes; the limit is"),
        ({"input_ids": []}, "input_ids: must not be empty"),
        ({"input_ids": "12"}, "input_ids: must be a sequence of token ids, not str"),
        ({"input_ids": [1, -2]}, r"input_ids\[1\]: must be a whole number from 0 to"),
        (
            {"input_ids": [1, 2.0]},
            r"input_ids\[1\]: must be a whole number from 0 to 4294967295, not 2.0",
        ),
        ({"prompt": "a", "messages": [USER]}, "prompt: excludes messages; give one of prompt"),
        ({"messages": [USER], "input_ids": [1]}, "messages: excludes input_ids"),
        ({"messages": "hello"}, "messages: must be a list of messages such as .*, not str"),
        ({"messages": []}, "messages: must have at least one message"),
        ({"messages": [USER, "b"]}, r"messages\[1\]: must be a mapping with role and content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: is missing"),
        ({"messages": [{"role": "", "content": ""}]}, r"messages\[0\]\.role: must not be empty"),
        (
            {"messages": [{**USER, "content": 1}]},
            r"messages\[0\]\.content: must be text, not int",
        ),
        *(
            ({"messages": [{**USER, "content": content}]}, rf"messages\[0\]\.content{said}")
            for content, said in (
                ([], ": must have at least one part"),
                ([1], r"\[0\]: must be a mapping with type and text, not int"),
                ([PART, {}], r"\[1\]\.type: is missing"),
                ([PART, IMAGE], r"\[1\]\.type: must be 'text', not 'image_url'"),
                ([{"type": "text"}], r"\[0\]\.text: is missing"),
                ([{**PART, "text": ["a"]}], r"\[0\]\.text: must be text, not list"),
                ([{**PART, "x": 1}], r"\[0\]\.x: is not a field of a part; allowed: type and text"),
            )
        ),
        (
            {"messages": [{**USER, "name": "x"}]},
            r"messages\[0\]\.name: is not a field of a message",
        ),
        (
            {"messages": [{"role": "user", "content": "a\udfff"}]},
            r"messages\[0\]\.content: character 1 is a lone surrogate",
        ),
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens: must be True or False"),
        ({"prompt": "a", "model": 5}, "model: must be str, not int"),
        ({"prompt": "a", "sites": ["resid", 3]}, r"sites\[1\]: must be str, not int"),
        ({"prompt": "a", "sites": ["resid", "resid"]}, r"sites\[1\]: repeats 'resid'"),
        ({"prompt": "a", "sites": None}, "sites: must be a name or a sequence of names"),
        ({"prompt": "a", "reduce": ""}, "reduce: must not be empty"),
        ({"prompt": "a", "rule": None}, "rule: must be str"),
        ({"prompt": "a", "dtype": "float64"}, "dtype: must be one of float32, bfloat16, float16"),
        ({"prompt": "a", "dtype": ["float32"]}, "dtype: must be one of"),
        ({"prompt": "a", "layers": []}, "layers: must name at least one layer"),
        ({"prompt": "a", "layers": 3}, "layers: must be a sequence of layer numbers, not 3"),
        (
            {"prompt": "a", "layers": [0, -1]},
            r"layers\[1\]: must be a whole number from 0 to [0-9]+, not -1",
        ),
        (
            {"prompt": "a", "layers": [True]},
            r"layers\[0\]: must be a whole number from 0 to [0-9]+, not True",
        ),
        ({"prompt": "a", "layers": [2, 2]}, r"layers\[1\]: repeats 2"),
        ({"prompt": "a", "reduce": "topk"}, "top_k: is missing"),
        ({"prompt": "a", "top_k": 5}, "top_k: is for reduce=\"topk\", not 'token'"),
        (
            {"prompt": "a", "reduce": "topk", "top_k": 0},
            "top_k: must be a whole number from 1 to 4096, not 0",
        ),
        (
            {"prompt": "a", "reduce": "topk", "top_k": 2.5},
            "top_k: must be a whole number from 1 to 4096, not 2.5",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=f"^{message}") as caught:
        Arguments(**arguments).job()
    assert isinstance(caught.value, ValueError)
    (violation,) = caught.value.violations
    assert str(caught.value).startswith(f"{violation.field}: ")


def test_a_conversation_arrives_as_it_is() -> None:
    job = Arguments(messages=({"role": "system", "content": ""}, USER)).job()
    assert job.spec.WhichOneof("input") == "chat"
    found = [(one.role, one.content) for one in job.spec.chat.messages]
    assert found == [("system", ""), ("user", "hello")]
    parts = [PART, {"type": "text", "text": "\n and"}, {"type": "text", "text": ""}]
    job = Arguments(messages=[{"role": "user", "content": parts}]).job()
    assert job.spec.chat.messages[0].content == "hello\n and"
    assert job.rename("chat.messages[1].role") == "messages[1].role"
    assert job.rename("chat.messages") == job.rename("chat") == "messages"


def test_special_tokens_are_named_where_they_are_not_the_default() -> None:
    assert not Arguments("a").job().spec.HasField("add_special_tokens")
    without = Arguments("a", add_special_tokens=False)
    assert without.job().spec.add_special_tokens is False
    assert without.job().spec.HasField("add_special_tokens")
    # Ids are used as they are.
    assert (
        not without.with_item({"prompt": None, "input_ids": [1]})
        .job()
        .spec.HasField("add_special_tokens")
    )


def test_a_site_may_be_one_name() -> None:
    assert Arguments("a", sites="embed").job().spec.sites == ["embed"]


def test_layers_and_k_arrive_in_order() -> None:
    spec = Arguments("a", reduce="topk", layers=(5, 0), top_k=16).job().spec
    assert (list(spec.layers), spec.top_k, spec.reduction) == ([5, 0], 16, "topk")
    plain = Arguments("a").job().spec
    assert (list(plain.layers), plain.top_k) == ([], 0)


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_every_text_arrives_as_it_is(prompt: str) -> None:
    spec = Arguments(prompt).job().spec
    assert type(spec).FromString(spec.SerializeToString()).prompt == prompt


@given(st.text(min_size=1))
def test_text_with_surrogates_is_refused_not_changed(prompt: str) -> None:
    has_surrogate = any("\ud800" <= char <= "\udfff" for char in prompt)
    if has_surrogate:
        with pytest.raises(reltrace.InvalidArgument, match=r"^prompt: character \d+ is a lone"):
            Arguments(prompt).job()
    else:
        assert Arguments(prompt).job().spec.prompt == prompt


@pytest.mark.parametrize(
    "address", ["", "localhost", "host:", ":50051", "host:port", "host:0", "host:70000", 50051]
)
def test_bad_addresses(address: Any) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r'^address: must be (str|"HOST:PORT")'):
        reltrace.Client(address)


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reltrace.AsyncClient().address == "127.0.0.1:50051"
    monkeypatch.setenv("RELTRACE_SERVER", "node7:1234")
    assert reltrace.AsyncClient().address == "node7:1234"
    assert reltrace.AsyncClient("other:1").address == "other:1"


def test_many_items_make_the_jobs_that_each_makes_alone() -> None:
    defaults = Arguments(
        model="a", sites=("embed", "resid"), target=["cats", 7], layers=[1, 0],
        add_special_tokens=False,
    )  # fmt: skip
    maker = JobMaker(defaults)
    items: list[Any] = [
        "text",
        {"prompt": "text", "id": 3},
        {"input_ids": [1, 2]},
        {"input_ids": [3], "model": "b"},
        {"messages": [USER]},
        {"prompt": "text", "add_special_tokens": True},
        {"prompt": "text", "model": None},
        {"prompt": "text"},
        {"prompt": "text", "rule": "gradient", "target": "max"},
        {"prompt": "text", "input_ids": None},
    ]
    for item in [*items, *reversed(items)]:
        assert maker.job(item) == defaults.with_item(item).job()


@pytest.mark.parametrize(
    "item",
    [
        5,
        "",
        {},
        {"prompt": ""},
        {"prompt": "a", "input_ids": [1]},
        {"messages": [USER], "prompt": "a"},
        {"messages": {}},
        {"input_ids": [1, True]},
        {"input_ids": [1, 2**32]},
        {"prompt": "a", "model": 5},
        {"prompt": "a", "model": []},
        {"prompt": "a", "modle": "b"},
        {"prompt": "x" * (MAX_JOB_BYTES + 1)},
    ],
)
def test_many_items_are_refused_as_each_is_alone(item: Any) -> None:
    defaults = Arguments(model="a")
    with pytest.raises(reltrace.InvalidArgument) as alone:
        defaults.with_item(item).job()
    maker = JobMaker(defaults)
    maker.job("fine")
    with pytest.raises(reltrace.InvalidArgument) as among_many:
        maker.job(item)
    assert str(among_many.value) == str(alone.value)
