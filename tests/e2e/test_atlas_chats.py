"""Atlases of conversations, through the whole service."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import reltrace
from e2e.conftest import Process, address_in
from e2e.test_atlas import same
from pyarrow import parquet
from reference.chat_templates import CHATML
from reference.checkpoints import save_checkpoint
from reltrace.atlas.folder import AtlasFolder

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "I have 5 cats and 3 dogs."}]},
    {"prompt": "My cats love to play with my dogs."},
    {
        "messages": [
            {"role": "system", "content": "You know birds."},
            {"role": "user", "content": "Is the fish silent?"},
            {"role": "assistant", "content": "The birds sing all day."},
            {"role": "user", "content": "My sister has two cats."},
        ]
    },
]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a small model whose chat template ends a turn with a special token.

    And of one that has no template.
    """
    folder = tmp_path_factory.mktemp("chatting")
    chats, plain = (save_checkpoint(folder / n, context_length=512) for n in ("chats", "plain"))
    (chats / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"))
    service = Process.start(
        folder, "reltrace", "up", "--port", "0", "--data", str(folder / "data"),
        "--model", str(chats), "--model", str(plain),
    )  # fmt: skip
    try:
        yield address_in(service.first_line())
    finally:
        service.stop()


@pytest.mark.parametrize("how", [{}, {"target": "max", "keep_special": True}])
def test_the_atlas_of_conversations_is_that_of_their_texts(
    chatting: str, tmp_path: Path, how: dict[str, Any]
) -> None:
    """
    Given conversations and a text
    If an atlas is built of them, and one of the texts that the chat template makes of them
    I expect the same bits but for the digests, contexts and labels in these texts, and no place at
    a special token of the template unless it is asked for.
    """
    with reltrace.Client(chatting) as client:
        texts = [client.tokenize(**item, model="chats", add_special_tokens=False) for item in CHATS]
        atlases = [
            client.build_atlas(
                prompts,
                tmp_path / name,
                model="chats",
                slice=2,
                k=4,
                add_special_tokens=False,
                **how,
            )
            for name, prompts in (("chats", CHATS), ("texts", [read.text for read in texts]))
        ]
    chats, plain = (AtlasFolder(tmp_path / name).read() for name in ("chats", "texts"))
    assert chats.digests.keys() == plain.digests.keys() == {0, 1}
    assert all(chats.digests[number] != plain.digests[number] for number in (0, 1))
    same(tmp_path / "chats", tmp_path / "texts", digests=False)
    atlas, other = atlases
    assert atlas.skipped == {}
    assert [atlas.prompt(number) for number in range(3)] == [tuple(read.tokens) for read in texts]
    assert "</s>" in atlas.prompt(0)
    places = [c for i in range(80) for c in atlas.neuron(1, i).contexts["relevance+"]]
    assert ("</s>" in {place.token for place in places}) == ("keep_special" in how)
    assert {place.prompt for place in places} == {0, 1, 2}
    assert [atlas.label(1, i) for i in range(80)] == [other.label(1, i) for i in range(80)]
    assert atlas.find("two cats")
    assert atlas.find("two cats") == other.find("two cats")
    pages = [one.save_page(tmp_path / f"{n}.html").read_text() for n, one in enumerate(atlases)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_corpus_of_conversations_may_be_a_file(
    chatting: str, start: Callable[..., Process], tmp_path: Path, kind: str
) -> None:
    """
    Given a file of conversations, of which that of JSON lines has a text and a line of OpenAI's
    batch format as well
    I expect the atlas that the same items give.
    """
    items = CHATS if kind == "jsonl" else [CHATS[0], CHATS[2]]
    source = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
        lines = [{**line, "body": {"model": "m", **CHATS[0]}}, *CHATS[1:]]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "csv":
        with source.open("w", newline="") as file:
            rows = [[number, json.dumps(item["messages"])] for number, item in enumerate(items)]
            csv.writer(file).writerows([["id", "messages"], *rows])
    else:
        parquet.write_table(pyarrow.Table.from_pylist(items), source)
    command = start(
        "reltrace", "atlas", "build", str(source), str(tmp_path / "out"),
        "--server", chatting, "--model", "chats", "--places", "2",
    )  # fmt: skip
    command.popen.communicate(timeout=60)
    assert command.popen.returncode == 0, command.errors.read_text()
    with reltrace.Client(chatting) as client:
        client.build_atlas(items, tmp_path / "expected", model="chats", k=2)
    same(tmp_path / "out", tmp_path / "expected")


def test_conversations_need_a_chat_template(chatting: str, tmp_path: Path) -> None:
    with reltrace.Client(chatting) as client:
        mixed = client.build_atlas(CHATS, tmp_path / "mixed", model="plain", k=2)
        assert list(mixed.skipped) == [0, 2]
        assert "chat template" in mixed.skipped[2]
        with pytest.raises(reltrace.InvalidArgument, match=r"none of them: .*chat template"):
            client.build_atlas(CHATS[:1], tmp_path / "none", model="plain", k=2)
