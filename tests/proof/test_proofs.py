"""The proofs, smaller than `make proof` has them: their intervals must leave out 0 all the same."""

from pathlib import Path

import pytest
import reltrace
from bench.service import serving
from proof.ablation import ablate
from proof.planted import look, plant
from proof.steering import steer
from reltrace_worker.demo import path as demo_path
from reltrace_worker.demo.corpus import held_out


def test_relevance_names_the_neurons_that_a_prediction_rests_on(demo_address: str) -> None:
    prompts = [example.prompt for example in held_out(40, 77)]
    with reltrace.Client(demo_address) as client:
        found = ablate(client, str(demo_path()), prompts, (8, 32), 0)
    for one in found:
        assert one.fell["relevance"].mean > one.fell["activation"].mean
        for more in one.more.values():
            assert more.count == 40
            assert more.mean - more.margin > 0
    few, many = found
    assert many.moved["relevance"].mean > few.moved["relevance"].mean


def test_labels_name_what_neurons_speak_for(demo_address: str, tmp_path: Path) -> None:
    corpus = held_out(3000, 9)
    with reltrace.Client(demo_address) as client:
        atlas = client.build_atlas([example.prompt for example in corpus], tmp_path)
        answers = {example.answer for example in corpus}
        (found,) = steer(client, atlas, answers, held_out(200, 77), (2,), 0, 80)
    assert found.neurons > 50
    assert found.labelled.mean - found.labelled.margin > 0
    assert found.more.mean - found.more.margin > 0
    assert found.wins > 0.6


def test_a_planted_neuron_is_found_and_labelled(tmp_path: Path) -> None:
    """
    Given a model with a neuron that fires at "lunch"
    I expect the atlas to call it so, a search for the word to name it first, and the model to be
    otherwise what it was.
    """
    corpus = [example.prompt for example in held_out(1500, 9)]
    unchanged = plant(demo_path(), tmp_path / "planted", " lunch", corpus)
    with serving(tmp_path / "planted", 2) as address, reltrace.Client(address) as client:
        found = look(client.build_atlas(corpus, tmp_path / "atlas"), " lunch", unchanged)
    assert found.label.split(" · ")[0] == "lunch"
    assert found.place == 1
    assert found.relevant[0] >= found.relevant[1] - 3
    assert found.active == (16, 16)
    assert found.unchanged == pytest.approx(1, abs=0.02)
