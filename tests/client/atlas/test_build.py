"""The corpus of a build, and how a build is continued; tests/e2e build with workers."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import reltrace
from fake_server import FakeServer
from make_shard import make_shard
from reltrace.atlas import build as build_module
from reltrace.atlas.folder import AtlasFolder
from reltrace.atlas.jobs import BuiltShard
from reltrace.atlas.merged import MergedSite
from reltrace.atlas.settings import AtlasSettings
from reltrace.atlas.state import State
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace_proto.v1 import types_pb2

CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a text", "prompts: must be an iterable of prompts, not one str"),
        (b"a text", "prompts: must be an iterable of prompts, not one bytes"),
        ({"a": "text"}, "prompts: must be an iterable of prompts, not one dict"),
        (None, "prompts: must be an iterable of prompts, not NoneType"),
        (["a", 7], r"prompts\[1\]: must be text or a mapping, not int"),
        (["a", {"input_ids": [1]}], r"prompts\[1\]\.input_ids: is no field of a prompt of an at"),
        ([{"id": "a"}], r"prompts\[0\]: is missing; give prompt or messages"),
        ([{"prompt": ["a"]}], r"prompts\[0\]\.prompt: must be text, not list"),
        ([{"prompt": "\udfff"}], r"prompts\[0\]\.prompt: character 0 is a lone surrogate"),
        ([{"prompt": "a", "messages": CHAT}], r"prompts\[0\]\.prompt: excludes messages"),
        ([{"messages": "a"}], r"prompts\[0\]\.messages: must be a list of messages"),
        (["a", {"messages": []}], r"prompts\[1\]\.messages: must have at least one message"),
        (
            ["a", {"messages": [*CHAT, {"role": "user"}]}],
            r"prompts\[1\]\.messages\[1\]\.content: is missing",
        ),
        (["a", "b", "c\ud800"], r"prompts\[2\]: character 1 is a lone surrogate"),
        ([], "prompts: there are none: the corpus is empty"),
        (iter(()), "prompts: there are none: the corpus is empty"),
    ],
)
def test_what_is_no_corpus_is_refused(
    client: reltrace.Client, tmp_path: Path, prompts: object, message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        client.build_atlas(prompts, tmp_path / "atlas", slice=2**16)  # type: ignore[arg-type]
    assert not (tmp_path / "atlas").exists()


def test_a_fault_in_a_conversation_is_named_by_its_place_in_the_corpus(
    server: FakeServer, client: reltrace.Client, tmp_path: Path
) -> None:
    server.faults = lambda spec: [("corpus.chats[1].messages[0].role", "is not served")]
    with pytest.raises(
        reltrace.InvalidArgument, match=r"^prompts\[1\]\.messages\[0\]\.role: is not served"
    ):
        client.build_atlas(["a", {"messages": CHAT}], tmp_path / "atlas")
    asked = server.requests[0].jobs[0].corpus
    assert list(asked.prompts) == ["a", ""]
    assert {number: sent_of(chat) for number, chat in asked.chats.items()} == {1: CHAT}
    later = AtlasSettings(None, "attnlrp", None, 2, 16, "batch").job([""], 48)
    assert later.rename("corpus.chats[3].messages[0].role") == "prompts[51].messages[0].role"
    server.faults = lambda spec: [("corpus.chats", "is more than the workers of fake can do")]
    with pytest.raises(reltrace.InvalidArgument, match=r"^messages: is more than the workers"):
        client.build_atlas([{"messages": CHAT}], tmp_path / "atlas")


def sent_of(chat: types_pb2.Chat) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in chat.messages]


def test_one_process_at_a_time_builds_in_a_folder(client: reltrace.Client, tmp_path: Path) -> None:
    other = AtlasFolder(tmp_path)
    with other.lock():
        identity = other.begin_build()
        with pytest.raises(reltrace.TraceError, match="another process builds the atlas in"):
            client.build_atlas(["a"], tmp_path)
    # The next build continues it.
    again = AtlasFolder(tmp_path)
    with again.lock():
        assert again.begin_build() == identity


def test_a_folder_that_can_not_be_is_named(client: reltrace.Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(reltrace.InvalidArgument, match=r"out: .* can not be used: Not a dir"):
        client.build_atlas(["a"], tmp_path / "file" / "atlas")


class FakeSliceJobs:
    """Returns random shards without a server.

    Attributes
    ----------
    asked : list of int
        The slices that were asked for.
    """

    asked: ClassVar[list[int]]

    def __init__(self, *about: object) -> None:
        pass

    @asynccontextmanager
    async def build(self, number: int, digest: str, job: object) -> AsyncIterator[BuiltShard]:
        self.asked.append(number)
        yield BuiltShard(make_shard(number), cast("Submission", f"slice {number}"))


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let builds need no server; return what they free on it."""
    found: list[str] = []

    async def free(connection: object, made: Iterable[Submission]) -> None:
        found.extend(cast("Iterable[str]", made))

    monkeypatch.setattr(FakeSliceJobs, "asked", [], raising=False)
    monkeypatch.setattr(build_module, "SliceJobs", FakeSliceJobs)
    monkeypatch.setattr(build_module, "free_shards", free)
    return found


PROMPTS = [f"prompt {number}" for number in range(8)]


async def built(
    out: Path, prompts: Iterable[str | Mapping[str, Any]] = PROMPTS, **other: Any
) -> State:
    settings = {"model": None, "rule": "attnlrp", "target": "max", "k": 2, "slice": 2}
    plan = AtlasSettings(**{**settings, "priority": "batch", **other})
    return await build_module.build(cast("Connection", None), prompts, out, plan, lambda _: None)


def same(one: State, other: State) -> bool:
    """Compare two atlases bit for bit."""
    return (
        (one.digests, one.tokens, one.about) == (other.digests, other.tokens, other.about)
        and np.array_equal(one.counts.positions, other.counts.positions)
        and all(
            np.array_equal(array, getattr(other.sites[site], name))
            for site, merged in one.sites.items()
            for name, array in vars(merged).items()
        )
    )


async def test_a_build_that_is_cancelled_in_the_midst_of_a_merge_writes_whole_slices(
    freed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a build of four slices
    If it is cancelled when the second is merged in part
    I expect what is written to be whole slices, with their digests, of which the server is told,
    and the next run to come to what an undisturbed one does.
    """
    whole = await built(tmp_path / "whole")
    keep, began, goes_on, layers = MergedSite._keep, threading.Event(), threading.Event(), count(1)

    def slow(self: MergedSite, layer: int, *arrays: Any) -> None:
        keep(self, layer, *arrays)
        # Both sites of the first slice, and a layer of the second.
        if next(layers) == 2 * 3 + 1:
            began.set()
            goes_on.wait(30)

    freed.clear()
    monkeypatch.setattr(MergedSite, "_keep", slow)
    task = asyncio.create_task(built(tmp_path / "torn"))
    assert await asyncio.to_thread(began.wait, 30)
    task.cancel()
    await asyncio.wait({task}, timeout=0.3)
    assert not task.done(), "the merge is waited for"
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    written = AtlasFolder(tmp_path / "torn").read()
    assert sorted(freed) == [f"slice {number}" for number in sorted(written.digests)]
    assert len(written.digests) == 2
    FakeSliceJobs.asked.clear()
    await built(tmp_path / "torn")
    assert sorted(FakeSliceJobs.asked) == sorted({0, 1, 2, 3} - set(written.digests))
    assert same(AtlasFolder(tmp_path / "torn").read(), whole)


async def test_a_slice_that_fails_in_the_midst_of_its_merge_is_not_written_in_part(
    freed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await built(tmp_path / "whole")
    keep, layers = MergedSite._keep, count(1)

    def broken(self: MergedSite, layer: int, *arrays: Any) -> None:
        if next(layers) == 2 * 3 + 2:
            raise MemoryError("as told")
        keep(self, layer, *arrays)

    monkeypatch.setattr(MergedSite, "_keep", broken)
    with pytest.raises(MemoryError, match="as told"):
        await built(tmp_path / "torn")
    monkeypatch.setattr(MergedSite, "_keep", keep)
    await built(tmp_path / "torn")
    assert same(AtlasFolder(tmp_path / "torn").read(), whole)


async def test_what_another_has_built_meanwhile_is_not_replaced(
    freed: list[str], tmp_path: Path
) -> None:
    """
    Given two that build in one folder, which begin before there is anything
    If the first ends before the second sends anything
    I expect the second, of other settings, to be refused, and of the same to find nothing missing.
    """

    def meanwhile(**other: Any) -> Iterator[str]:
        asyncio.run(built(tmp_path, **other))
        FakeSliceJobs.asked.clear()
        yield from PROMPTS

    await built(tmp_path, meanwhile())
    assert FakeSliceJobs.asked == []
    before = AtlasFolder(tmp_path).read()
    # What is the same is not named.
    said = r"out: .* holds an atlas with other settings \(k was \d+ and is 1\); use the same"
    with pytest.raises(reltrace.InvalidArgument, match=said):
        await built(tmp_path, k=1)
    shutil.rmtree(tmp_path)
    with pytest.raises(reltrace.InvalidArgument, match=said):
        await built(tmp_path, meanwhile(), k=1)
    assert same(AtlasFolder(tmp_path).read(), before)


async def test_what_is_explained_is_a_setting(freed: list[str], tmp_path: Path) -> None:
    """
    Given atlases of all next tokens, of some of them, of others, with first tokens, and of a target
    I expect a folder of one to be refused to all others.
    """
    ways: list[dict[str, Any]] = [
        {"target": None},
        {"target": None, "positions": 4},
        {"target": None, "positions": 4, "seed": 1},
        {"target": None, "keep_special": True},
        {"target": None, "add_special_tokens": False},
        {"target": "max"},
    ]
    for number, way in enumerate(ways):
        out = tmp_path / str(number)
        await built(out, **way)
        await built(out, **way)
        for other in ways:
            if other is not way:
                with pytest.raises(reltrace.InvalidArgument, match="holds an atlas with other set"):
                    await built(out, **other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": None, "positions": 0}, "positions: must be a whole number from 1 to 65536"),
        ({"target": None, "positions": 65537}, "positions: must be a whole number from 1 to 65536"),
        ({"target": "max", "positions": 4}, "positions: .* exclude a target"),
        ({"target": None, "seed": 1}, "seed: draws positions, and none are drawn"),
        ({"target": None, "positions": 4, "seed": -1}, "seed: must be a whole number from 0"),
        ({"add_special_tokens": 1}, "add_special_tokens: must be True or False, not 1"),
    ],
)
async def test_positions_that_can_not_be_are_named(
    freed: list[str], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        await built(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_job_says_what_is_explained() -> None:
    def asked(**how: Any) -> types_pb2.JobSpec:
        settings = {"model": None, "rule": "", "target": None, "k": 2, "slice": 2}
        return AtlasSettings(**{**settings, "priority": "batch", **how}).job(["a"]).spec

    assert (asked().corpus.positions, list(asked().targets)) == (1 << 16, [])
    drawn = asked(positions=3, seed=7).corpus
    assert (drawn.positions, drawn.seed, drawn.keep_special) == (3, 7, False)
    one = asked(target="max", keep_special=True)
    assert (one.corpus.positions, one.corpus.keep_special, len(one.targets)) == (0, True, 1)
    assert not one.HasField("add_special_tokens")
    plain = asked(add_special_tokens=False)
    assert (plain.HasField("add_special_tokens"), plain.add_special_tokens) == (True, False)


async def test_a_build_goes_on_with_the_same_conversations_alone(
    freed: list[str], tmp_path: Path
) -> None:
    """
    Given an atlas of texts and conversations
    If one message, one role, or what is a conversation changes
    I expect the folder to be refused; and the same in other words to be gone on with.
    """
    corpus = [{"messages": CHAT, "id": "first"}, *PROMPTS[:3]]
    await built(tmp_path, corpus)
    FakeSliceJobs.asked.clear()
    await built(tmp_path, [{"messages": tuple(CHAT)}, *({"prompt": one} for one in PROMPTS[:3])])
    assert FakeSliceJobs.asked == []
    for other in (
        {"messages": [{"role": "user", "content": "b"}]},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [*CHAT, *CHAT]},
        "a",
    ):
        with pytest.raises(reltrace.InvalidArgument, match=r"prompts: differ from .* from 0 on"):
            await built(tmp_path, [other, *PROMPTS[:3]])
    assert FakeSliceJobs.asked == []


async def test_an_atlas_that_does_not_say_what_is_added_is_of_prompts_with_it(
    freed: list[str], tmp_path: Path
) -> None:
    """An earlier version wrote such folders."""
    state = await built(tmp_path)
    del state.about["add_special_tokens"]
    AtlasFolder(tmp_path).write(state)
    FakeSliceJobs.asked.clear()
    await built(tmp_path)
    assert FakeSliceJobs.asked == []
    with pytest.raises(
        reltrace.InvalidArgument, match=r"settings \(add_special_tokens was True and"
    ):
        await built(tmp_path, add_special_tokens=False)


async def test_an_id_is_another_target_than_its_text(freed: list[str], tmp_path: Path) -> None:
    for target, known in ((4, 4), (np.int64(4), 4), ("4", "4"), ("max", "max")):
        shutil.rmtree(tmp_path)
        assert (await built(tmp_path, target=target)).about["target"] == known
        await built(tmp_path, target=known)
        for other in {4, "4", "max"} - {known}:
            with pytest.raises(reltrace.InvalidArgument, match=rf"\(target was {known!r} and is"):
                await built(tmp_path, target=other)


async def test_a_damaged_file_of_the_corpus_is_made_again(freed: list[str], tmp_path: Path) -> None:
    await built(tmp_path)
    path = tmp_path / "corpus" / "000002.safetensors"
    whole, atlas = path.read_bytes(), (tmp_path / "atlas.safetensors").read_bytes()
    # The last of its numbers: a token that there is none of.
    path.write_bytes(whole[:-4] + np.int32(1 << 20).tobytes())
    FakeSliceJobs.asked.clear()
    await built(tmp_path)
    assert FakeSliceJobs.asked == [2]
    assert path.read_bytes() == whole
    assert (tmp_path / "atlas.safetensors").read_bytes() == atlas


@pytest.mark.parametrize("file", ["atlas", "corpus/000001"])
async def test_a_full_disk_is_an_error_that_names_the_file(
    freed: list[str], tmp_path: Path, file: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / f"{file}.safetensors.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        await built(tmp_path)
    assert caught.value.filename == str(tmp_path / f"{file}.safetensors")
    await built(tmp_path)


async def test_writing_takes_a_tenth_of_the_time_however_large_slices_are(
    freed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a clock by which a merge takes one second and a write four
    If 200 slices are merged
    I expect writing to take no more than a tenth of it all, the last write aside.
    """
    now, writes = 0.0, 0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def passing(seconds: float, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            nonlocal now, writes
            now += seconds
            writes += function is write
            function(*arguments)

        return timed

    write = AtlasFolder.write
    monkeypatch.setattr(build_module, "time", Clock)
    monkeypatch.setattr(State, "add", passing(1, State.add))
    monkeypatch.setattr(AtlasFolder, "write", passing(4, write))
    await built(tmp_path, [f"prompt {number}" for number in range(400)])
    assert 2 <= writes - 1 <= 0.1 * now / 4
    assert len(freed) == 200
