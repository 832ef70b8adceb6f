"""`Trace`: arrays, the per-layer view, files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import reltrace
from make_trace import make_trace
from safetensors.numpy import save_file


def test_relevance_is_resid_or_the_first_site() -> None:
    trace = make_trace({"embed": (5,), "resid": (3, 5)})
    assert trace.relevance is trace["resid"]
    trace = make_trace({"neuron": (3, 5), "embed": (5,)})
    assert trace.relevance is trace["neuron"]


def test_a_site_that_was_not_requested() -> None:
    with pytest.raises(KeyError, match="'head' was not requested; there are resid"):
        make_trace()["head"]


def test_a_site_of_several_tensors() -> None:
    trace = make_trace()
    parts = {"values": np.ones((3, 2), np.float32), "token": np.zeros((3, 2), np.int32)}
    trace = reltrace.Trace(
        trace.tokens, trace.token_ids, trace.target, trace.provenance, {"resid": parts}
    )
    with pytest.raises(KeyError, match="has parts values, token"):
        trace["resid"]
    assert trace.parts("resid")["token"].dtype == np.int32


@pytest.mark.parametrize("shape", [(3, 5), (3, 7), (3, 5, 7)])
def test_normalized_divides_each_layer_by_its_largest(shape: tuple[int, ...]) -> None:
    trace = make_trace({"resid": shape})
    flat = trace.relevance.reshape(3, -1)
    expected = (flat / np.abs(flat).max(axis=1, keepdims=True)).reshape(shape)
    np.testing.assert_array_equal(trace.normalized(), expected)
    assert trace.normalized().dtype == np.float32


def test_normalized_embeddings_have_one_scale() -> None:
    trace = make_trace({"embed": (5, 7)})
    values = trace["embed"]
    np.testing.assert_array_equal(trace.normalized("embed"), values / np.abs(values).max())


def test_a_layer_of_zeros_stays_zero_and_tiny_values_do_not_overflow() -> None:
    trace = make_trace()
    trace.relevance[0] = 0
    trace.relevance[1] = 1e-45  # the smallest subnormal: its reciprocal is infinite
    normalized = trace.normalized()
    np.testing.assert_array_equal(normalized[0], 0)
    np.testing.assert_array_equal(normalized[1], 1)
    assert np.isfinite(normalized).all()


def test_float16_is_normalized_in_float32() -> None:
    trace = make_trace()
    trace.arrays["resid"][""] = trace.relevance.astype(np.float16)  # type: ignore[index]
    assert trace.normalized().dtype == np.float32
    assert trace.relevance.dtype == np.float16


def test_by_token() -> None:
    full = make_trace({"resid": (3, 5, 7), "embed": (5, 7)})
    np.testing.assert_allclose(full.by_token(), full.relevance.sum(-1), rtol=1e-6)
    assert full.by_token("embed").shape == (5,)
    # The second has as many features as there are tokens.
    for shape in ((3, 7), (3, 5)):
        features = make_trace({"resid": shape}, reduction="feature")
        with pytest.raises(reltrace.InvalidArgument, match="'feature' leaves no value per token"):
            features.by_token()


def test_a_saved_trace_comes_back(tmp_path: Path) -> None:
    trace = make_trace({"resid": (3, 5), "embed": (5,), "attn_out": (3, 5)}, id="q 1")
    trace.arrays["embed"][""] = trace["embed"].astype(np.float16)  # type: ignore[index]
    path = tmp_path / "one.safetensors"
    assert trace.save(path) == path
    back = reltrace.Trace.load(path)
    assert back.sites == ("resid", "embed", "attn_out")
    assert (back.tokens, back.token_ids, back.id) == (trace.tokens, trace.token_ids, "q 1")
    assert (back.target, back.provenance) == (trace.target, trace.provenance)
    for site in trace.sites:
        assert back[site].dtype == trace[site].dtype
        np.testing.assert_array_equal(back[site], trace[site])
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_saving_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    make_trace(id=1).save(path)
    make_trace(id=2).save(path)
    assert reltrace.Trace.load(path).id == 2
    with pytest.raises(FileNotFoundError):
        make_trace().save(tmp_path / "no folder" / "one.safetensors")


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    text, tensors = tmp_path / "a.txt", tmp_path / "b.safetensors"
    text.write_text("hello")
    save_file({"x": np.zeros(2)}, tensors)
    for path in (text, tensors):
        with pytest.raises(reltrace.InvalidArgument, match=r"^path: .*Trace\.save"):
            reltrace.Trace.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        reltrace.Trace.load(tmp_path / "none")


def test_layers_are_saved_and_older_files_load(tmp_path: Path) -> None:
    trace = make_trace({"resid": (2, 5)}, layers=(7, 3))
    assert reltrace.Trace.load(trace.save(tmp_path / "a.safetensors")).layers == (7, 3)
    about = {**trace.to_dict(), "order": ["resid"]}
    assert about.pop("layers") == [7, 3]
    del about["relevance"]
    metadata = {"format": "reltrace-trace-1", "trace": json.dumps(about)}
    save_file({"resid": trace.relevance}, tmp_path / "b.safetensors", metadata)
    assert reltrace.Trace.load(tmp_path / "b.safetensors").layers == ()


def test_to_dict_is_json_even_with_nan() -> None:
    trace = make_trace({"resid": (3, 5), "embed": (5,)})
    trace.relevance[1, 2] = np.nan
    about = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert about["relevance"]["resid"][1][2] is None
    assert np.float32(about["relevance"]["resid"][0][0]) == trace.relevance[0, 0]
    assert about["target"]["token"] == "Ġdogs"
    assert about["provenance"]["versions"] == {"lxt": "2.1", "torch": "2.13.0"}


def test_it_can_be_sent_to_another_process_and_shown() -> None:
    trace = pickle.loads(pickle.dumps(make_trace(id=3)))
    assert repr(trace) == (
        "Trace(id=3, 5 tokens, target 'Ġdogs' (17.250), resid [3, 5], model 'tiny')"
    )


def test_errors_can_be_sent_to_another_process() -> None:
    error = reltrace.InvalidArgument("a: b", violations=[reltrace.Violation("a", "b")])
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.violations) == ("a: b", (reltrace.Violation("a", "b"),))
    assert str(pickle.loads(pickle.dumps(reltrace.DeadlineExceeded("late")))) == "late"


def test_the_share_of_the_first_token() -> None:
    trace = make_trace({"resid": (2, 4), "embed": (4,), "head": (2, 4)}, tokens=list("abcd"))
    trace.arrays["resid"][""][:] = [[-3, 1, -1, 1], [1, 1, 1, -1]]
    trace.arrays["embed"][""][:] = [-1, 0, 0, 1]
    trace.arrays["head"][""][:] = 0
    found = trace.first_token_share()
    assert found.total == pytest.approx(4 / 10)
    np.testing.assert_allclose(found.layers, [0.5, 0.25])
    assert trace.first_token_share("embed").layers.tolist() == [0.5]
    assert np.isnan(trace.first_token_share("head").total)
    with pytest.raises(reltrace.InvalidArgument, match="leaves no value per token"):
        make_trace({"resid": (2, 6)}, reduction="feature").first_token_share()
