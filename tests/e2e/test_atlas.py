"""An atlas through the whole service: whoever makes it, and however often it is broken off."""

import asyncio
import csv
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from demo_model.corpus import held_out
from e2e.conftest import Process, wait_until
from reltrace.atlas import build as module
from reltrace.atlas.folder import AtlasFolder
from reltrace.atlas.jobs import SliceJobs, free_shards
from reltrace.calls.pinning import Pins
from reltrace.types.request import Job

CORPUS = [example.prompt for example in held_out(260, 9)]
SLICE = 40


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two schedulers with a queue each: one with one worker, the other with three."""
    processes, addresses = [], []
    for workers in (1, 3):
        folder = tmp_path_factory.mktemp(f"atlas-{workers}")
        scheduler = Process.start(
            folder, "reltrace_scheduler", "--data", str(folder / "data"),
            "--listen", "127.0.0.1:0",
            "--results-url", (folder / "large").as_uri(), "--results-above",
            # By the store of large results where there is one worker.
            "100000" if workers == 1 else "100000000",
        )  # fmt: skip
        address = scheduler.first_line().split()[-1]
        processes.append(scheduler)
        processes += [
            Process.start(
                folder, "reltrace_worker", "--scheduler", address, "--model", "demo",
                "--threads", "1",
            )
            for _ in range(workers)
        ]  # fmt: skip
        with reltrace.Client(address, retry_timeout=100) as client:
            wait_until(
                lambda client=client, workers=workers: (
                    [model.workers for model in client.models()] == [workers]
                ),
                "all workers are there",
                100,
            )
        addresses.append(address)
    yield addresses[0], addresses[1]
    for process in reversed(processes):
        process.stop()


def same(first: Path, second: Path, digests: bool = True) -> None:
    """Compare two atlases bit for bit, and unless told not to what they say of their corpora."""
    one, two = AtlasFolder(first).read(), AtlasFolder(second).read()
    assert one.digests == two.digests or not digests
    assert (one.tokens, one.vocabulary, one.skipped) == (two.tokens, two.vocabulary, two.skipped)
    for site, merged in one.sites.items():
        for name, array in vars(merged).items():
            np.testing.assert_array_equal(array, getattr(two.sites[site], name), f"{site} {name}")


def test_three_workers_make_the_atlas_that_one_makes(
    services: tuple[str, str], tmp_path: Path
) -> None:
    """
    Given a corpus with an empty prompt in it
    If one worker makes its atlas, and three others make it
    I expect the same bits, the empty prompt to be named, and contexts to be those that
    traces give.
    """
    corpus = [*CORPUS[:7], "", *CORPUS[7:]]
    atlases = []
    for number, address in enumerate(services):
        with reltrace.Client(address) as client:
            atlases.append(
                client.build_atlas(corpus, tmp_path / str(number), target="max", slice=SLICE, k=4)
            )
    same(tmp_path / "0", tmp_path / "1")
    atlas = atlases[0]
    assert list(atlas.skipped) == [7]
    assert "is empty" in atlas.skipped[7]
    assert atlas.prompt(7) == ()
    with reltrace.Client(services[0]) as client:
        strong = max(
            (atlas.neuron(2, index).contexts["relevance+"][0] for index in range(256)),
            key=lambda context: context.relevance,
        )
        trace = client.trace(corpus[strong.prompt], sites="neuron", reduce="full")
        assert tuple(trace.tokens) == strong.tokens
        assert strong.token == trace.tokens[strong.position]
        assert trace["neuron"][2, strong.position].max() == pytest.approx(
            strong.relevance, rel=1e-3
        )


@pytest.mark.parametrize("how", [{}, {"positions": 3, "seed": 5}, {"keep_special": True}])
def test_next_tokens_are_explained_alike_by_any_workers(
    services: tuple[str, str], tmp_path: Path, how: dict[str, Any]
) -> None:
    """
    Given a corpus whose prompts explain their own next tokens, at all positions and at some
    If one worker makes its atlas, and three others make it
    I expect the same bits, contexts that say what follows, and no first token unless asked for.
    """
    for number, address in enumerate(services):
        with reltrace.Client(address) as client:
            atlas = client.build_atlas(CORPUS, tmp_path / str(number), slice=SLICE, k=4, **how)
    same(tmp_path / "0", tmp_path / "1")
    first = 0 if "keep_special" in how else 1
    assert atlas.neuron(2, 17).count == atlas.tokens - first * len(CORPUS)
    for index in range(20):
        for name in ("relevance+", "activation-"):
            for context in atlas.neuron(2, index).contexts[name]:
                assert context.position >= first
                following = context.tokens[context.position + 1 : context.position + 2]
                assert context.target == "".join(following)


def test_means_and_quantiles_are_those_of_all_tokens(
    services: tuple[str, str], tmp_path: Path
) -> None:
    with reltrace.Client(services[0]) as client:
        atlas = client.build_atlas(
            CORPUS[:30], tmp_path, target="max", keep_special=True, slice=7, k=2
        )
        traces = list(client.trace_many(CORPUS[:30], sites=("neuron", "head"), reduce="full"))
    for site, read in (("neuron", atlas.neuron), ("head", atlas.head)):
        every = np.concatenate([trace[site][1] for trace in traces])  # type: ignore[union-attr]
        for index in range(3):
            feature, values = read(1, index), every[:, index]
            assert feature.count == len(values)
            assert feature.mean["relevance"] == pytest.approx(values.mean(), abs=1e-6)
            for share in (0.1, 0.9):
                exact, about = np.quantile(values, share), feature.quantile(share)
                # An octave: half to twice as much.
                assert abs(about) <= 2.1 * abs(exact) + 1e-7
                assert abs(exact) <= 2.1 * abs(about) + 1e-7
            strongest = feature.contexts["relevance+"]
            assert [c.relevance for c in strongest] == pytest.approx(
                sorted(values[values > 0])[::-1][:2], rel=1e-3
            )


def test_a_prompts_neurons_have_the_labels_of_the_atlas(
    services: tuple[str, str], tmp_path: Path
) -> None:
    with reltrace.Client(services[0]) as client:
        atlas = client.build_atlas(CORPUS, tmp_path / "atlas", slice=SLICE)
        trace = client.trace(CORPUS[0], sites=("neuron", "head"), reduce="topk", top_k=9)
    neurons, heads = trace.neurons(20, atlas), trace.heads(20, atlas)
    assert len(neurons) == len(heads) == 20
    assert [n.label for n in neurons] == [atlas.label(n.layer, n.neuron) for n in neurons]
    assert [h.label for h in heads] == [atlas.label(h.layer, h.head, "head") for h in heads]
    named = [n.label for n in neurons if n.label]
    assert named
    text = trace.plot(tmp_path / "trace.html", atlas=atlas).read_text()
    assert named[0] in text


def test_an_atlas_that_is_broken_off_goes_on(
    services: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given an atlas whose making is killed after some slices, at a moment when what is merged
    was written, and again later
    I expect each further run to make what is missing, and the whole to be as undisturbed.
    """
    monkeypatch.setattr(module, "_MIN_PAUSE", 0.0)
    monkeypatch.setattr(module, "_PAUSE_PER_WRITE", 0.0)
    with reltrace.Client(services[1]) as client:
        client.build_atlas(CORPUS, tmp_path / "whole", slice=SLICE)

    made: list[int] = []
    merge = module._Builder._merge

    def until_killed(limit: int) -> Callable[..., None]:
        def merged(self: module._Builder, some: module.Slice, came: module.BuiltShard) -> None:
            if len(made) >= limit:
                raise KeyboardInterrupt
            made.append(some.number)
            merge(self, some, came)

        return merged

    async def run() -> None:
        async with reltrace.AsyncClient(services[1]) as client:
            await client.build_atlas(CORPUS, tmp_path / "parts", slice=SLICE)

    for limit in (2, 5):
        monkeypatch.setattr(module._Builder, "_merge", until_killed(limit))
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(run())
    monkeypatch.setattr(module._Builder, "_merge", until_killed(1000))
    asyncio.run(run())
    assert sorted(made) == list(range(11))
    same(tmp_path / "whole", tmp_path / "parts")


def test_nothing_is_made_twice_however_often_a_build_is_killed(
    services: tuple[str, str], start: Callable[..., Process], tmp_path: Path
) -> None:
    """
    Given a command that builds an atlas
    If it is killed with SIGKILL three times, as soon as some slices are on disk, and called again
    I expect slices to become more each time, every slice to have been made once, and the files of
    a build that was left alone, to the byte.
    """
    source = tmp_path / "corpus.txt"
    source.write_text("\n".join(CORPUS))
    killed, size, server = tmp_path / "killed", 4, services[1]
    build = ("atlas", "build", str(source), str(killed), "--server", server, "--slice", str(size))

    def there() -> int:
        return len(list((killed / "corpus").glob("*.safetensors")))

    with reltrace.Client(server) as client:
        before = client.status().ended
        for limit in (2, 12, 22):
            process = start("reltrace", *build)
            wait_until(lambda limit=limit: there() >= limit, "some slices are there", 60)
            process.kill()
            # On a fast machine the later ones find nothing missing.
            assert limit > 2 or there() < len(CORPUS) // size
        last = start("reltrace", *build)
        last.popen.communicate(timeout=100)
        assert last.popen.returncode == 0, last.errors.read_text()
        after = client.status().ended
        assert after == {**before, "SUCCEEDED": before.get("SUCCEEDED", 0) + len(CORPUS) // size}
        client.build_atlas(CORPUS, tmp_path / "whole", slice=size)
    assert files(killed) == files(tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_slice_that_was_handed_in_before_is_read_if_it_is_there(
    services: tuple[str, str],
) -> None:
    """
    Given a slice that an earlier run had made, and did not free
    I expect the next run to read it; once it is freed, or was another job, to have it made anew.
    """

    async def come(jobs: SliceJobs, number: int, job: Job) -> module.BuiltShard:
        async with jobs.build(number, "digest", job) as made:
            return made

    async def run() -> None:
        async with reltrace.AsyncClient(services[0]) as client:
            settings = module.AtlasSettings(None, "attnlrp", "max", 2, 9, "batch")
            job, other = settings.job(CORPUS[:3]), settings.job(CORPUS[3:5])
            first, second, third, elsewhere = (
                SliceJobs(client._connection, identity, settings, Pins(client._connection))
                for identity in (*["one folder"] * 3, "another folder")
            )
            made = await come(first, 0, job)
            again = await come(second, 0, job)
            assert again.submission.id == made.submission.id
            np.testing.assert_array_equal(
                again.shard.arrays["neuron"]["strongest"], made.shard.arrays["neuron"]["strongest"]
            )
            assert (await come(elsewhere, 0, job)).submission.id != made.submission.id
            assert (await come(second, 1, job)).submission.id != made.submission.id
            await free_shards(client._connection, [again.submission])
            anew = await come(third, 0, job)
            assert anew.submission.id != made.submission.id
            changed = await come(second, 0, other)
            assert len(changed.shard.arrays["corpus"]["lengths"]) == 2

    asyncio.run(run())


def test_another_corpus_or_other_settings_are_refused(
    services: tuple[str, str], tmp_path: Path
) -> None:
    with reltrace.Client(services[0]) as client:
        client.build_atlas(CORPUS[:20], tmp_path, slice=10, k=2)
        with pytest.raises(reltrace.InvalidArgument, match=r"out: .* other settings"):
            client.build_atlas(CORPUS[:20], tmp_path, slice=10, k=3)
        with pytest.raises(reltrace.InvalidArgument, match=r"prompts: differ from .* from 10 on"):
            client.build_atlas([*CORPUS[:10], *CORPUS[20:30]], tmp_path, slice=10, k=2)
        for fewer in (10, 0):
            with pytest.raises(
                reltrace.InvalidArgument, match=r"prompts: (end after 10|there are)"
            ):
                client.build_atlas(CORPUS[:fewer], tmp_path, slice=10, k=2)
        with pytest.raises(reltrace.InvalidArgument, match=r"k: must be .* from 1 to 64"):
            client.build_atlas(CORPUS[:20], tmp_path / "x", k=65)
        with pytest.raises(reltrace.ModelNotFound):
            client.build_atlas(CORPUS[:20], tmp_path / "x", model="nobody")


def test_a_corpus_file_that_is_lost_is_made_again(
    services: tuple[str, str], tmp_path: Path
) -> None:
    """
    Given an atlas of whose corpus a file is gone, and another is cut off
    I expect the next build to make these, and nothing else to change.
    """
    with reltrace.Client(services[0]) as client:
        client.build_atlas(CORPUS[:30], tmp_path, slice=10, k=2)
        before = files(tmp_path)
        (tmp_path / "corpus" / "000000.safetensors").unlink()
        cut = tmp_path / "corpus" / "000002.safetensors"
        cut.write_bytes(cut.read_bytes()[:-1])
        client.build_atlas(CORPUS[:30], tmp_path, slice=10, k=2)
    assert files(tmp_path) == before


@dataclass(frozen=True)
class Said:
    """What a command said, and how it ended."""

    text: str
    error: str
    code: int


@pytest.fixture
def say(start: Callable[..., Process]) -> Callable[..., Said]:
    def say(*words: str) -> Said:
        process = start("reltrace", "atlas", *words)
        text, _ = process.popen.communicate(timeout=60)
        return Said(text, process.errors.read_text(), process.popen.returncode)

    return say


@pytest.fixture(scope="module")
def built(services: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    with reltrace.Client(services[0]) as client:
        client.build_atlas(CORPUS, out)
    return out


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "csv"])
def test_a_corpus_may_be_a_file_of_any_kind(
    services: tuple[str, str], say: Callable[..., Said], tmp_path: Path, kind: str
) -> None:
    """
    Given a corpus as lines, as compressed JSON lines and as CSV
    I expect the same atlas.
    """
    prompts, source = CORPUS[:30], tmp_path / f"corpus.{kind}"
    if kind == "txt":
        source.write_text("\n".join(prompts))
    elif kind == "csv":
        with source.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["text"], *([prompt] for prompt in prompts)])
    else:
        lines = "".join(json.dumps({"prompt": prompt, "id": prompt}) + "\n" for prompt in prompts)
        source.write_bytes(gzip.compress(lines.encode()))
    column = ("--column", "text") if kind == "csv" else ()
    said = say("build", str(source), str(tmp_path / "out"), "--server", services[0], *column)
    assert said.code == 0, said.error
    assert said.text.startswith(f"{tmp_path / 'out'}: ")
    assert "30/30" in said.error
    with reltrace.Client(services[0]) as client:
        client.build_atlas(prompts, tmp_path / "expected")
    same(tmp_path / "out", tmp_path / "expected")


def test_a_line_that_is_no_prompt_is_named(
    services: tuple[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"prompt": "We have cats"}\n{"input_ids": [1, 2]}\n')
    said = say("build", str(source), str(tmp_path / "out"), "--server", services[0], "--quiet")
    assert said.code == 1
    assert "corpus, line 2.input_ids: is no field of a prompt of an atlas" in said.error
    assert "Traceback" not in said.error
    gone = say("build", str(tmp_path / "no.txt"), str(tmp_path / "out"))
    assert (gone.code, "there is no file" in gone.error) == (1, True)


def test_the_commands_show_and_find(built: Path, say: Callable[..., Said]) -> None:
    said = say("show", str(built), "2", "17")
    assert "neuron 17 of layer 2" in said.text
    assert "1 %, 50 %, 99 % below" in " ".join(said.text.split())
    assert said.text.count("⟦") == said.text.count("⟧") == 32
    plain = json.loads(say("show", str(built), "1", "3", "--site", "head", "--json").text)
    assert set(plain) == {
        "label", "labelled_by", "mass", "count", "mean", "quantiles", "relevance+", "relevance-",
    }  # fmt: skip
    head = reltrace.load_atlas(built).head(1, 3)
    assert plain["count"] == head.count
    assert plain["quantiles"]["activation"]["0.99"] == head.quantile(0.99, "activation")
    assert plain["labelled_by"] == "log-odds"
    bad = say("show", str(built), "2", "9999")
    assert bad.code == 1
    assert "neuron: must be a whole number from 0 to 255, not 9999" in bad.error

    found = json.loads(say("find", str(built), "love to play", "-k", "3", "--json").text)
    assert len(found) == 3
    for match in found:
        strongest = match["strongest"]
        context = "".join(strongest["tokens"][: strongest["position"] + 3])
        assert "love to play" in context
    listed = say("find", str(built), "love to play").text.replace("⟦", "").replace("⟧", "")
    assert "love to play" in " ".join(listed.split())
    assert "No neuron has it" in say("find", str(built), "quantum chromodynamics").text


def test_the_commands_write_pages_and_labels(
    built: Path, say: Callable[..., Said], tmp_path: Path
) -> None:
    assert say("page", str(built), str(tmp_path / "atlas.html"), "--most", "10").code == 0
    page = (tmp_path / "atlas.html").read_text()
    assert "Atlas of reltrace-demo" in page
    labels = tmp_path / "labels.jsonl"
    assert say("labels", "export", str(built), str(labels), "--most", "5").text.endswith(
        "5 labels\n"
    )
    first = json.loads(labels.read_text().splitlines()[0])
    labels.write_text(json.dumps({**first, "label": "what a person says"}) + "\n")
    assert say("labels", "import", str(built), str(labels)).text.endswith("1 labels changed\n")
    shown = say("show", str(built), str(first["layer"]), str(first["index"]))
    assert "what a person says" in shown.text
    labels.write_text("{}\n")
    bad = say("labels", "import", str(built), str(labels))
    assert bad.code == 1
    assert "line 1: layer: must be a whole number" in bad.error
