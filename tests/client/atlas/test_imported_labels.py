"""Labels out of an atlas and in again."""

import json
from pathlib import Path

import pytest
import reltrace
from make_atlas import MODEL, REVISION, make_atlas

PROMPTS = [("my cats run", "far"), ("the big cats", "sleep"), *[("we eat", "pie")] * 300]
PLACES = {(1, 0): [(0, 1, 0.5), (1, 2, 0.75)], (0, 2): [(0, 2, -1.0)]}


@pytest.fixture
def atlas(tmp_path: Path) -> reltrace.Atlas:
    return make_atlas(tmp_path / "atlas", PROMPTS, PLACES)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_labels_are_written_with_what_they_rest_on(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    assert atlas.export_labels(tmp_path / "out.jsonl") == 6
    first, second, *_ = lines(tmp_path / "out.jsonl")
    assert first == {
        "site": "neuron", "layer": 1, "index": 0, "label": "cats", "by": "log-odds",
        "mass": 1.25, "made_by": [MODEL, REVISION],
        "contexts": [
            {
                "relevance": 0.75, "activation": 7.5,
                "text": " the big ⟦cats⟧", "token": " cats", "target": " sleep",
            },
            {
                "relevance": 0.5, "activation": 5.0,
                "text": " my ⟦cats⟧ run", "token": " cats", "target": " far",
            },
        ],
    }  # fmt: skip
    # By relevance mass; one that never speaks for a prediction has no contexts of that kind.
    assert (second["layer"], second["index"], second["contexts"]) == (0, 2, [])
    assert atlas.export_labels(tmp_path / "out.jsonl", site="head", most=2) == 2


def test_labels_that_were_given_are_kept(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    """
    Given labels that somebody wrote
    I expect them to be the neurons' labels here and wherever the atlas is read again, until they
    are taken away.
    """
    source = write(
        tmp_path / "in.jsonl",
        {"layer": 1, "index": 0, "label": "cats, of any size", "by": "Ida", "note": "passed over"},
        {"site": "head", "layer": 0, "index": 2, "label": "</script>"},
    )
    assert atlas.import_labels(source) == 2
    for read in (atlas, reltrace.load_atlas(tmp_path / "atlas")):
        assert read.label(1, 0) == "cats, of any size"
        assert read.neuron(1, 0).labelled_by == "Ida"
        assert read.label(0, 2, "head") == "</script>"
        assert read.label(0, 2) == ""
    assert atlas.import_labels(source) == 0
    gone = write(tmp_path / "gone.jsonl", {"layer": 1, "index": 0, "label": ""})
    assert atlas.import_labels(gone) == 1
    assert reltrace.load_atlas(tmp_path / "atlas").label(1, 0) == "cats"


@pytest.mark.parametrize("made_by", [[MODEL, "another"], ["another", REVISION], "x", None])
def test_labels_of_another_model_or_revision_are_refused(
    atlas: reltrace.Atlas, tmp_path: Path, made_by: object
) -> None:
    """
    Given labels that were written for an atlas, and changed
    If they say that they are of another model or revision
    I expect none to be taken; and so where the atlas beside its labels is exchanged for another's.
    """
    path = tmp_path / "labels.jsonl"
    atlas.export_labels(path)
    records = [record | {"label": "changed"} for record in lines(path)]
    assert records[0]["made_by"] == [MODEL, REVISION]
    other = write(tmp_path / "other.jsonl", *records[:-1], records[-1] | {"made_by": made_by})
    with pytest.raises(reltrace.InvalidArgument, match=r"line 6: made_by: is .*, and the atlas is"):
        atlas.import_labels(other)
    assert atlas.import_labels(write(path, *records)) == 6
    kept = tmp_path / "atlas" / "labels.jsonl"
    write(kept, *(record | {"made_by": made_by} for record in lines(kept)))
    with pytest.raises(reltrace.InvalidArgument, match="made_by: is"):
        reltrace.load_atlas(tmp_path / "atlas")


def test_what_was_exported_and_not_changed_stays_built_in(
    atlas: reltrace.Atlas, tmp_path: Path
) -> None:
    path = tmp_path / "labels.jsonl"
    atlas.export_labels(path)
    assert atlas.import_labels(path) == 0
    records = lines(path)
    records[0]["label"] = "what purrs"
    assert atlas.import_labels(write(path, *records)) == 1
    assert atlas.neuron(1, 0).label == "what purrs"
    assert atlas.neuron(1, 0).labelled_by == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: line: is no JSON"),
        ("[]", "line 2: line: must be an object"),
        ('{"layer": 1, "label": "x"}', "line 2: index: must be a whole number from 0 on, not None"),
        ('{"layer": true, "index": 0, "label": "x"}', "layer: .* from 0 on, not True"),
        ('{"layer": 0, "index": 0}', "label: must be a line of at most 200 characters"),
        ('{"layer": 0, "index": 0, "label": "a\\nb"}', "label: must be a line"),
        (json.dumps({"layer": 0, "index": 0, "label": "x" * 201}), "label: must be a line"),
        ('{"layer": 0, "index": 0, "label": "x", "by": 7}', "by: must be a line"),
        (r'{"layer": 0, "index": 0, "label": "\u001b[31m"}', r"label: character 0 is '\\x1b': "),
        (r'{"layer": 0, "index": 0, "label": "a\tb"}', r"label: character 1 is '\\t': "),
        (r'{"layer": 0, "index": 0, "label": "\ud800"}', r"label: character 0 is '\\ud800': "),
        (r'{"layer": 0, "index": 0, "label": "x", "by": "\u2028"}', "by: character 0 is"),
        (r'{"layer": 0, "index": 0, "label": "a\u202eb"}', r"label: character 1 is '\\u202e': "),
        (r'{"layer": 0, "index": 0, "label": "\u2066"}', r"label: character 0 is '\\u2066': "),
        (r'{"layer": 0, "index": 0, "label": "x", "by": "\u200f"}', "by: character 0 is"),
        ('{"layer": 9, "index": 0, "label": "x"}', "layer: .* from 0 to 1, not 9"),
        ('{"layer": 0, "index": 3, "label": "x"}', "neuron: .* from 0 to 2, not 3"),
        ('{"site": "x", "layer": 0, "index": 0, "label": "x"}', "site: must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_and_nothing_is_taken(
    atlas: reltrace.Atlas, tmp_path: Path, line: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"layer": 1, "index": 0, "label": "good"}}\n{line}\n')
    with pytest.raises(reltrace.InvalidArgument, match=message) as error:
        atlas.import_labels(source)
    assert f"{source}, line 2" in str(error.value)
    assert atlas.label(1, 0) == "cats"
    assert reltrace.load_atlas(tmp_path / "atlas").label(1, 0) == "cats"


def test_labels_may_be_of_any_language_and_begin_with_a_mark(
    atlas: reltrace.Atlas, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    line = json.dumps({"layer": 1, "index": 0, "label": "חתולים 🐈‍⬛"}, ensure_ascii=False)
    source.write_text(f"{line}\r\n", encoding="utf-8-sig")
    assert atlas.import_labels(source) == 1
    assert reltrace.load_atlas(tmp_path / "atlas").label(1, 0) == "חתולים 🐈‍⬛"


def test_a_file_that_is_not_utf8_is_named(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    good, bad = '{"layer": 1, "index": 0, "label": "Vögel"}\n', tmp_path / "in.jsonl"
    bad.write_bytes(good.encode() + good.encode("latin-1"))
    with pytest.raises(reltrace.InvalidArgument, match=f"{bad}, line 2: line: is not UTF-8"):
        atlas.import_labels(bad)
    bad.write_bytes(good.encode("utf-16"))
    with pytest.raises(reltrace.InvalidArgument, match=f"{bad}, line 1: line: is not UTF-8"):
        atlas.import_labels(bad)
    assert atlas.label(1, 0) == "cats"
    kept = tmp_path / "atlas" / "labels.jsonl"
    kept.write_bytes(good.encode("latin-1"))
    with pytest.raises(reltrace.InvalidArgument, match=f"{kept}, line 1: line: is not UTF-8"):
        reltrace.load_atlas(tmp_path / "atlas")


@pytest.mark.parametrize("name", ["labels.jsonl", "../atlas/labels.jsonl", "link.jsonl"])
def test_labels_that_were_given_are_not_written_over(
    atlas: reltrace.Atlas, tmp_path: Path, name: str
) -> None:
    source = write(tmp_path / "in.jsonl", {"layer": 1, "index": 0, "label": "what purrs"})
    atlas.import_labels(source)
    kept = tmp_path / "atlas" / "labels.jsonl"
    (tmp_path / "atlas" / "link.jsonl").symlink_to(kept)
    before, path = kept.read_bytes(), tmp_path / "atlas" / name
    with pytest.raises(reltrace.InvalidArgument, match=f"path: {path} is where the atlas keeps"):
        atlas.export_labels(path)
    assert kept.read_bytes() == before
